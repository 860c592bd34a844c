"""Sums, differences, products and word problems up to 100, with steps a tiny model can take one digit at a time."""

from functools import cache

from nanozhchat.builtin.world import Item, Rng, combos, is_held_out, lines, names, places, things

LIMIT = 100  # no operand or result is larger
SMALL = 20  # sums up to here are what people ask first: they get a share of their own, and may be asked with 几
SMALL_SHARE = 0.35


@cache
def pairs(op: str, held: bool) -> tuple[tuple[int, int], ...]:
    """Return the operand pairs of one split for "add" or "sub"; one-digit ones are the atoms and always trained."""
    if op == "add":
        pool = [(a, b) for a in range(1, LIMIT) for b in range(1, LIMIT - a + 1)]
    else:
        pool = [(a, b) for a in range(2, LIMIT) for b in range(1, a)]
    return tuple((a, b) for a, b in pool if (max(a, b) > 9 and is_held_out(f"{op}:{a},{b}")) is held)


@cache
def _small_pairs(op: str, held: bool) -> tuple[tuple[int, int], ...]:
    return tuple((a, b) for a, b in pairs(op, held) if max(a, b, a + b if op == "add" else a) <= SMALL)


def _pair(rng: Rng, op: str, held: bool) -> tuple[int, int]:
    return rng.pick(_small_pairs(op, held) if rng.random() < SMALL_SHARE else pairs(op, held))


@cache
def products(held: bool, section: str) -> tuple[tuple[int, int, int], ...]:
    """Return (a, b, phrasing index): tables cannot be derived, so what is held out is table entry x phrasing."""
    rows = tuple(f"{a}*{b}" for a in range(2, 10) for b in range(2, 10))
    return tuple((2 + i // 8, 2 + i % 8, j) for i, j in combos(rows, lines("arithmetic", section), held))


def add_steps(a: int, b: int) -> str:
    """Return the worked sum, ending with the result."""
    if a < 10 and b < 10:
        return f"{a}加{b}等于{a + b}"
    ones, tens_a, tens_b = a % 10 + b % 10, a // 10, b // 10
    tens, end = f"{tens_a}加{tens_b}", f"{a}加{b}等于{a + b}"
    if ones >= 10:
        return f"个位{a % 10}加{b % 10}得{ones}，写{ones - 10}进1；十位{tens}加1得{tens_a + tens_b + 1}；{end}"
    return f"个位{a % 10}加{b % 10}得{ones}，写{ones}；十位{tens}得{tens_a + tens_b}；{end}"


def sub_steps(a: int, b: int) -> str:
    """Return the worked difference, ending with the result."""
    if a < 10:
        return f"{a}减{b}等于{a - b}"
    ones_a, ones_b, tens_a, tens_b = a % 10, b % 10, a // 10, b // 10
    if ones_a >= ones_b:
        ones = f"个位{ones_a}减{ones_b}得{ones_a - ones_b}"
        return f"{ones}；十位{tens_a}减{tens_b}得{tens_a - tens_b}；{a}减{b}等于{a - b}"
    ones = f"个位借1，{ones_a + 10}减{ones_b}得{ones_a + 10 - ones_b}"
    return f"{ones}；十位{tens_a}减1减{tens_b}得{tens_a - 1 - tens_b}；{a}减{b}等于{a - b}"


def _item(ask: str, answer: str, result: int, key: str) -> Item:
    return Item("arithmetic", "", ask, answer, key, "number", (str(result),))


def _calculate(rng: Rng, held: bool, op: int, story: str = "") -> tuple[str, int, int, str, int, str]:
    """Return a phrasing, its two numbers, the steps, the result and the key. story: "_story" for word problems."""
    if op == 4:
        a, b, phrasing = rng.pick(products(held, "mul" + story))
        shape = lines("arithmetic", "mul" + story)[phrasing]
        return shape, a, b, f"{a}乘{b}等于{a * b}", a * b, f"mul:{a},{b},{story[1:2]}{phrasing}"
    name = "add" if op < 2 else "sub"
    a, b = _pair(rng, name, held)
    shape = rng.pick(lines("arithmetic", name + story))
    steps, result = (add_steps(a, b), a + b) if name == "add" else (sub_steps(a, b), a - b)
    return shape, a, b, steps, result, f"{name}:{a},{b}"


def draw_sum(rng: Rng, held: bool) -> Item:
    """Return a bare calculation."""
    shape, a, b, steps, result, key = _calculate(rng, held, rng.below(5))
    return _item(shape.format(a=a, b=b), steps + "。", result, key)


def draw_problem(rng: Rng, held: bool) -> Item:
    """Return a word problem about named people and things."""
    noun, measure = rng.pick(things("countable"))
    n, k = rng.two(names(held))
    op = rng.below(5)
    place = rng.pick(places(held, "home_kind"))
    shape, a, b, steps, result, key = _calculate(rng, held, op, "_story")
    ask = shape.format(n=n, k=k, a=a, b=b, m=measure, t=noun, p=place)
    if result <= SMALL and rng.random() < 0.5:
        ask = ask.replace("多少" + measure, "几" + measure).replace("多少元", "几元")
    unit = "元" if "元" in shape else measure + noun
    return _item(ask, f"{steps}，答案是{result}{unit}。", result, key)


def draw(rng: Rng, held: bool) -> Item:
    """Return a calculation (two in three) or a word problem."""
    return draw_sum(rng, held) if rng.random() < 0.65 else draw_problem(rng, held)
