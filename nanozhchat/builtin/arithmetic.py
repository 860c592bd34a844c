"""Sums, differences, products and word problems up to 100, with steps a tiny model can take one digit at a time."""

from functools import cache

from nanozhchat.builtin.world import Item, Rng, combos, is_held_out, lines, names, places, things

LIMIT = 100  # no operand or result is larger
SMALL = 20  # sums up to here are what people ask first: they get a share of their own, and may be asked with 几
SMALL_SHARE = 0.35


@cache
def pairs(op: str, held: bool, largest: int = LIMIT) -> tuple[tuple[int, int], ...]:
    """Return the operand pairs of one split for "add" or "sub"; one-digit ones are the atoms and always trained."""
    pool = ((a, b) for a in range(1, LIMIT) for b in range(1, LIMIT - a + 1 if op == "add" else a))
    pool = ((a, b) for a, b in pool if (a + b if op == "add" else a) <= largest)
    return tuple((a, b) for a, b in pool if (max(a, b) > 9 and is_held_out(f"{op}:{a},{b}")) is held)


@cache
def products(held: bool, section: str) -> tuple[tuple[int, int, int], ...]:
    """Return (a, b, phrasing index): tables cannot be derived, so what is held out is table entry x phrasing."""
    rows = tuple(f"{a}*{b}" for a in range(2, 10) for b in range(2, 10))
    return tuple((2 + i // 8, 2 + i % 8, j) for i, j in combos(rows, lines("arithmetic", section), held))


def add_steps(a: int, b: int) -> str:
    """Return the worked sum, ending with the result."""
    (tens_a, a1), (tens_b, b1), end = divmod(a, 10), divmod(b, 10), f"{a}加{b}等于{a + b}"
    if a < 10 and b < 10:
        return end
    carry, written = divmod(a1 + b1, 10)
    ones = f"个位{a1}加{b1}得{a1 + b1}，写{written}{'进1' * carry}"
    return f"{ones}；十位{tens_a}加{tens_b}{'加1' * carry}得{tens_a + tens_b + carry}；{end}"


def sub_steps(a: int, b: int) -> str:
    """Return the worked difference, ending with the result."""
    (tens_a, a1), (tens_b, b1), end = divmod(a, 10), divmod(b, 10), f"{a}减{b}等于{a - b}"
    if a < 10:
        return end
    borrowed = int(a1 < b1)
    ones = f"个位{'借1，' * borrowed}{a1 + 10 * borrowed}减{b1}得{a1 + 10 * borrowed - b1}"
    return f"{ones}；十位{tens_a}{'减1' * borrowed}减{tens_b}得{tens_a - borrowed - tens_b}；{end}"


def _calculate(rng: Rng, held: bool, op: int, story: str = "") -> tuple[str, int, int, str, int, str]:
    """Return a phrasing, its two numbers, the steps, the result and the key. story: "_story" for word problems."""
    if op == 4:
        a, b, phrasing = rng.pick(products(held, "mul" + story))
        shape = lines("arithmetic", "mul" + story)[phrasing]
        return shape, a, b, f"{a}乘{b}等于{a * b}", a * b, f"mul:{a},{b},{story[1:2]}{phrasing}"
    name = "add" if op < 2 else "sub"
    a, b = rng.pick(pairs(name, held, SMALL if rng.random() < SMALL_SHARE else LIMIT))
    shape = rng.pick(lines("arithmetic", name + story))
    steps, result = (add_steps(a, b), a + b) if name == "add" else (sub_steps(a, b), a - b)
    return shape, a, b, steps, result, f"{name}:{a},{b}"


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
    return Item("arithmetic", "", ask, f"{steps}，答案是{result}{unit}。", key, "number", (str(result),))


def draw(rng: Rng, held: bool) -> Item:
    """Return a calculation (two in three) or a word problem."""
    if rng.random() >= 0.65:
        return draw_problem(rng, held)
    shape, a, b, steps, result, key = _calculate(rng, held, rng.below(5))
    return Item("arithmetic", "", shape.format(a=a, b=b), steps + "。", key, "number", (str(result),))
