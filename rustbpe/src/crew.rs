//! Threads that work in step: thousands of short turns a second, too short to put anyone to sleep in between.

use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError, RwLock};

/// Turns of the waiting loop before the processor is offered to others.
const SPINS: u32 = 1000;

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

/// Locks; what a thread left behind that panicked is never used, since the panic is passed on.
pub fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Gives orders to one thread per item.
#[derive(Debug)]
pub struct Crew<'a, T, O> {
    items: &'a [Mutex<T>],
    order: RwLock<O>,
    work: fn(&mut T, &O),
    turn: AtomicU64,
    done: AtomicUsize,
    over: AtomicBool,
}

/// Runs `leader`, which may give orders; item 0 is worked on by its own thread, every other by one of the crew.
pub fn lead<T: Send, O: Default + Send + Sync, R>(
    items: &[Mutex<T>],
    work: fn(&mut T, &O),
    leader: impl FnOnce(&Crew<'_, T, O>) -> R,
) -> R {
    let crew = Crew {
        items,
        order: RwLock::default(),
        work,
        turn: AtomicU64::new(0),
        done: AtomicUsize::new(0),
        over: AtomicBool::new(false),
    };
    std::thread::scope(|scope| {
        for item in items.iter().skip(1) {
            scope.spawn(|| crew.follow(item));
        }
        let _over = Over(&crew.over);
        leader(&crew)
    })
}

/// Ends the crew when the leader returns, or anybody panics.
struct Over<'a>(&'a AtomicBool);

impl Drop for Over<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Release);
    }
}

impl<T, O> Crew<'_, T, O> {
    /// Has all items worked on by one order, and returns the order.
    pub fn order(&self, order: O) -> O
    where
        O: Default,
    {
        let followers = self.items.len().saturating_sub(1);
        if followers == 0 {
            self.items.iter().for_each(|item| (self.work)(&mut lock(item), &order));
            return order;
        }
        *self.order.write().unwrap_or_else(PoisonError::into_inner) = order;
        self.done.store(0, Ordering::Release);
        self.turn.fetch_add(1, Ordering::Release);
        self.obey(&self.items[0]);
        self.wait_until(|| self.done.load(Ordering::Acquire) == followers);
        std::mem::take(&mut *self.order.write().unwrap_or_else(PoisonError::into_inner))
    }

    fn follow(&self, item: &Mutex<T>) {
        let _over = Over(&self.over);
        let mut seen = 0;
        loop {
            self.wait_until(|| self.turn.load(Ordering::Acquire) != seen);
            if self.over.load(Ordering::Acquire) {
                return;
            }
            seen += 1;
            self.obey(item);
            self.done.fetch_add(1, Ordering::Release);
        }
    }

    fn obey(&self, item: &Mutex<T>) {
        (self.work)(&mut lock(item), &self.order.read().unwrap_or_else(PoisonError::into_inner));
    }

    /// Waits for a condition, or for the end.
    fn wait_until(&self, ready: impl Fn() -> bool) {
        let mut spins = 0;
        while !ready() && !self.over.load(Ordering::Acquire) {
            spins += 1;
            if spins < SPINS {
                std::hint::spin_loop();
            } else {
                std::thread::yield_now();
            }
        }
    }
}
