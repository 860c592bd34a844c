//! Threads that work in step: thousands of short turns a second, too short to put anyone to sleep in between.

use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

/// Turns of the waiting loop before the processor is offered to others.
const SPINS: u32 = 200;

/// Runs `work` on every item, each in a thread of its own.
pub fn each<T: Send, R: Send>(items: &mut [T], work: impl Fn(&mut T) -> R + Sync) -> Vec<R> {
    let Some((first, others)) = items.split_first_mut() else { return Vec::new() };
    std::thread::scope(|scope| {
        let threads: Vec<_> = others.iter_mut().map(|item| scope.spawn(|| work(item))).collect();
        let mut results = vec![work(first)];
        // A panic is passed on as it is.
        results.extend(threads.into_iter().map(|t| t.join().unwrap_or_else(|e| std::panic::resume_unwind(e))));
        results
    })
}

/// Runs two things, the second in a thread of its own if that is allowed.
pub fn join<A, B: Send>(may_split: bool, a: impl FnOnce() -> A, b: impl FnOnce() -> B + Send) -> (A, B) {
    if !may_split {
        return (a(), b());
    }
    std::thread::scope(|scope| {
        let b = scope.spawn(b);
        (a(), b.join().unwrap_or_else(|e| std::panic::resume_unwind(e)))
    })
}

/// Locks; what a thread left behind that panicked is never used, since the panic is passed on.
pub fn read<T>(lock: &RwLock<T>) -> RwLockReadGuard<'_, T> {
    lock.read().unwrap_or_else(PoisonError::into_inner)
}

/// Locks to change; see `read`.
pub fn write<T>(lock: &RwLock<T>) -> RwLockWriteGuard<'_, T> {
    lock.write().unwrap_or_else(PoisonError::into_inner)
}

/// Gives orders to threads.
#[derive(Debug)]
pub struct Crew<W, O> {
    work: W,
    order: Apart<RwLock<O>>,
    followers: usize,
    turn: Apart<AtomicU64>,
    done: Apart<AtomicUsize>,
    over: Apart<AtomicBool>,
}

/// In cache lines of its own: what one thread waits for must not be near what another writes.
#[derive(Debug, Default)]
#[repr(align(128))]
struct Apart<T>(T);

/// Runs `leader`, which may give orders; each of `n >= 1` threads, the leader's first, does `work(number, order)`.
pub fn lead<W: Fn(usize, O) + Sync, O: Copy + Default + Send + Sync, R>(
    n: usize,
    work: W,
    leader: impl FnOnce(&Crew<W, O>) -> R,
) -> R {
    let crew = Crew {
        work,
        order: Apart::default(),
        followers: n - 1,
        turn: Apart::default(),
        done: Apart::default(),
        over: Apart::default(),
    };
    std::thread::scope(|scope| {
        let crew = &crew;
        for number in 1..n {
            scope.spawn(move || crew.follow(number));
        }
        let _over = Over(&crew.over.0);
        leader(crew)
    })
}

/// Ends the crew when the leader returns, or anybody panics.
struct Over<'a>(&'a AtomicBool);

impl Drop for Over<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Release);
    }
}

impl<W: Fn(usize, O) + Sync, O: Copy> Crew<W, O> {
    /// Has all threads obey an order.
    pub fn order(&self, order: O) {
        *write(&self.order.0) = order;
        self.done.0.store(0, Ordering::Release);
        self.turn.0.fetch_add(1, Ordering::Release);
        (self.work)(0, order);
        self.wait_until(|| self.done.0.load(Ordering::Acquire) == self.followers);
    }

    fn follow(&self, number: usize) {
        let _over = Over(&self.over.0);
        let mut seen = 0;
        loop {
            self.wait_until(|| self.turn.0.load(Ordering::Acquire) != seen);
            if self.over.0.load(Ordering::Acquire) {
                return;
            }
            seen += 1;
            (self.work)(number, *read(&self.order.0));
            self.done.0.fetch_add(1, Ordering::Release);
        }
    }

    /// Waits for a condition, or for the end.
    fn wait_until(&self, ready: impl Fn() -> bool) {
        let mut spins = 0;
        while !ready() && !self.over.0.load(Ordering::Acquire) {
            spins += 1;
            if spins < SPINS {
                std::hint::spin_loop();
            } else {
                std::thread::yield_now();
            }
        }
    }
}
