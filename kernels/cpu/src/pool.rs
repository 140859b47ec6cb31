//! Threads that work through the items of one region together, hundreds of regions a token.
//!
//! Whichever thread is free claims the next item, so a thread whose core is taken by another
//! process holds up at most the item that it is at; the others, the caller among them, do the rest.
//! A region costs less than a microsecond while the threads are hot: they spin between regions, and
//! only after `SPIN` without work do they park, so that an idle server uses no CPU. Spinning yields
//! the core now and then, so a machine with fewer free cores than threads moves on. A region inside
//! a region runs on the calling thread alone.

use std::{
    any::Any,
    cell::{Cell, UnsafeCell},
    hint,
    panic::{AssertUnwindSafe, catch_unwind, resume_unwind},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering::SeqCst},
    },
    thread::{self, JoinHandle, Thread},
    time::{Duration, Instant},
};

/// How long a thread looks for work before it parks: longer than the gaps between the ops of a
/// step.
const SPIN: Duration = Duration::from_micros(100);
/// Pauses between two looks at the clock; the core is offered to others as often.
const SPINS_PER_YIELD: u32 = 64;

/// A region's function of thread and item, its lifetime erased.
type Job = *const (dyn Fn(usize, usize) + Sync);

/// A region and how far it is claimed, in one word: region number, items, next item.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Ticket(u64);

impl Ticket {
    /// Items of a region that fit into a ticket.
    const ITEMS_MAX: usize = u16::MAX as usize;

    fn items(self) -> usize {
        usize::from((self.0 >> 16) as u16)
    }

    fn next(self) -> usize {
        usize::from(self.0 as u16)
    }

    /// Whether an item is left to claim.
    fn is_open(self) -> bool {
        self.next() < self.items()
    }

    /// The next region, nothing of it claimed.
    fn following(self, items: usize) -> Self {
        let number = ((self.0 >> 32) as u32).wrapping_add(1);
        Self(u64::from(number) << 32 | (items.min(Self::ITEMS_MAX) as u64) << 16)
    }
}

/// A worker's sleep, on a cache line of its own.
#[repr(align(128))]
struct Gate {
    parked: AtomicBool,
}

/// A word that every thread writes, on a cache line of its own.
#[repr(align(128))]
struct Line<T>(T);

/// What the threads of a pool share.
struct Regions {
    /// The latest `Ticket`. Whoever moves its `next` on owns that item.
    ticket: Line<AtomicU64>,
    /// Items of the region that are finished.
    done: Line<AtomicUsize>,
    job: UnsafeCell<Option<Job>>,
    /// Whether the caller gave up spinning for `done`.
    caller_parked: AtomicBool,
    caller: Mutex<Option<Thread>>,
    panic: Mutex<Option<Box<dyn Any + Send>>>,
    gates: Vec<Gate>,
    stop: AtomicBool,
}

// SAFETY: `job` is written by the caller while no region is open, before it stores the ticket that
// opens one. It is read only by who has claimed an item of that region: the region ends when every
// item is done, so it is not written again before the claimed one is. The pointer is to a `Sync`
// function that outlives the region, because `for_each` returns after the region's end.
unsafe impl Sync for Regions {}
// SAFETY: as above; nothing in `Regions` is tied to the thread that made it.
unsafe impl Send for Regions {}

thread_local! {
    /// Whether this thread is inside a region, of any pool.
    static IN_REGION: Cell<bool> = const { Cell::new(false) };
}

/// A fixed number of threads, the caller among them.
pub struct Pool {
    regions: Arc<Regions>,
    workers: Vec<JoinHandle<()>>,
    /// One region at a time.
    turn: Mutex<()>,
}

/// Looks at `ready` for `SPIN`; whether it came true.
fn spin_until(ready: impl Fn() -> bool) -> bool {
    let mut since = None;
    loop {
        for _ in 0..SPINS_PER_YIELD {
            if ready() {
                return true;
            }
            hint::spin_loop();
        }
        if since.get_or_insert_with(Instant::now).elapsed() > SPIN {
            return false;
        }
        thread::yield_now();
    }
}

/// Sleeps until `ready`. Whoever makes it so takes `parked` down and unparks; a late one of the
/// region before may do that too, so the flag goes up again before every look.
fn park_until(parked: &AtomicBool, ready: impl Fn() -> bool) {
    loop {
        parked.store(true, SeqCst);
        if ready() {
            parked.store(false, SeqCst);
            return;
        }
        thread::park();
    }
}

impl Regions {
    fn ticket(&self) -> Ticket {
        Ticket(self.ticket.0.load(SeqCst))
    }

    /// The next item of the open region, and the region's ticket.
    fn claim(&self) -> Option<(usize, Ticket)> {
        let mut ticket = self.ticket();
        while ticket.is_open() {
            match self.ticket.0.compare_exchange_weak(ticket.0, ticket.0 + 1, SeqCst, SeqCst) {
                Ok(_) => return Some((ticket.next(), ticket)),
                Err(now) => ticket = Ticket(now),
            }
        }
        None
    }

    /// Claims and runs items as thread `thread` until none is left.
    fn work(&self, thread: usize) {
        while let Some((item, ticket)) = self.claim() {
            // SAFETY: an item of the open region is claimed and not done: `job` is this region's,
            // and stays.
            if let Some(job) = unsafe { (*self.job.get()).map(|job| &*job) } {
                self.run_one(job, thread, item);
            }
            if self.done.0.fetch_add(1, SeqCst) + 1 == ticket.items()
                && self.caller_parked.load(SeqCst)
                && self.caller_parked.swap(false, SeqCst)
            {
                let caller = self.caller.lock().unwrap_or_else(PoisonError::into_inner);
                if let Some(caller) = caller.as_ref() {
                    caller.unpark();
                }
            }
        }
    }

    /// Runs `f(thread, item)`, keeping the first panic for the caller.
    fn run_one(&self, f: &(dyn Fn(usize, usize) + Sync), thread: usize, item: usize) {
        let outer = IN_REGION.replace(true);
        let outcome = catch_unwind(AssertUnwindSafe(|| f(thread, item)));
        IN_REGION.set(outer);
        if let Err(panic) = outcome {
            self.panic.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(panic);
        }
    }

    /// What worker `index` does until the pool is dropped; the caller is thread 0.
    fn serve(&self, index: usize) {
        let parked = &self.gates[index - 1].parked;
        let called = || self.ticket().is_open() || self.stop.load(SeqCst);
        loop {
            if !spin_until(called) {
                park_until(parked, called);
            }
            if self.stop.load(SeqCst) {
                return;
            }
            self.work(index);
        }
    }
}

impl Pool {
    /// A pool of `threads` in all, at least one; `threads - 1` are started.
    ///
    /// # Errors
    /// The system refuses a thread.
    pub fn new(threads: usize) -> std::io::Result<Self> {
        let extra = threads.max(1) - 1;
        let regions = Arc::new(Regions {
            ticket: Line(AtomicU64::new(0)),
            done: Line(AtomicUsize::new(0)),
            job: UnsafeCell::new(None),
            caller_parked: AtomicBool::new(false),
            caller: Mutex::new(None),
            panic: Mutex::new(None),
            gates: (0..extra).map(|_| Gate { parked: AtomicBool::new(false) }).collect(),
            stop: AtomicBool::new(false),
        });
        let mut pool = Self { regions, workers: Vec::with_capacity(extra), turn: Mutex::new(()) };
        for index in 1..=extra {
            let regions = Arc::clone(&pool.regions);
            let named = thread::Builder::new().name(format!("kernel-{index}"));
            pool.workers.push(named.spawn(move || regions.serve(index))?);
        }
        Ok(pool)
    }

    /// Threads, the caller's among them.
    pub fn threads(&self) -> usize {
        self.regions.gates.len() + 1
    }

    /// Runs `f(thread, item)` for every item below `items`, whichever thread is free taking the
    /// next, and returns when all are done. Threads are `0..threads`; no two run as the same one.
    ///
    /// # Panics
    /// With the panic of `f`, once every item is done.
    pub fn for_each(&self, items: usize, f: &(dyn Fn(usize, usize) + Sync)) {
        if items <= 1 || self.threads() == 1 || IN_REGION.get() {
            return (0..items).for_each(|item| f(0, item));
        }
        for first in (0..items).step_by(Ticket::ITEMS_MAX) {
            let region = (items - first).min(Ticket::ITEMS_MAX);
            self.region(region, &|thread, item| f(thread, first + item));
        }
    }

    fn region(&self, items: usize, f: &(dyn Fn(usize, usize) + Sync)) {
        let turn = self.turn.lock().unwrap_or_else(PoisonError::into_inner);
        let regions = &*self.regions;
        // SAFETY: only the lifetime changes; nobody follows the pointer after this function
        // returns, because it waits for every item to be done and cannot unwind before.
        let job = unsafe { std::mem::transmute::<&(dyn Fn(usize, usize) + Sync), Job>(f) };
        // SAFETY: no worker reads `job` between regions, and `turn` keeps other callers out.
        unsafe { *regions.job.get() = Some(job) };
        regions.done.0.store(0, SeqCst);
        regions.ticket.0.store(regions.ticket().following(items).0, SeqCst);
        self.wake();
        regions.work(0);
        self.wait(items);
        let panic = regions.panic.lock().unwrap_or_else(PoisonError::into_inner).take();
        drop(turn);
        if let Some(panic) = panic {
            resume_unwind(panic);
        }
    }

    /// Wakes the workers that sleep.
    fn wake(&self) {
        for (gate, worker) in self.regions.gates.iter().zip(&self.workers) {
            if gate.parked.load(SeqCst) && gate.parked.swap(false, SeqCst) {
                worker.thread().unpark();
            }
        }
    }

    /// Waits for the region's items to be done.
    fn wait(&self, items: usize) {
        let regions = &*self.regions;
        let done = || regions.done.0.load(SeqCst) == items;
        if spin_until(done) {
            return;
        }
        *regions.caller.lock().unwrap_or_else(PoisonError::into_inner) = Some(thread::current());
        park_until(&regions.caller_parked, done);
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.regions.stop.store(true, SeqCst);
        self.wake();
        for worker in self.workers.drain(..) {
            // A worker ends only by seeing `stop`: panics of regions were handed to their callers.
            let _ = worker.join();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_item_runs_once_in_each_of_many_regions() {
        for threads in 1..=5 {
            let pool = Pool::new(threads).unwrap();
            let counts: Vec<_> = (0..7).map(|_| AtomicUsize::new(0)).collect();
            for _ in 0..2000 {
                pool.for_each(7, &|thread, item| {
                    assert!(thread < threads);
                    counts[item].fetch_add(1, SeqCst);
                });
            }
            assert!(counts.iter().all(|c| c.load(SeqCst) == 2000));
        }
    }

    #[test]
    fn more_items_than_a_ticket_holds() {
        let pool = Pool::new(2).unwrap();
        let sum = AtomicUsize::new(0);
        pool.for_each(100_000, &|_, item| {
            sum.fetch_add(item, SeqCst);
        });
        assert_eq!(sum.load(SeqCst), 100_000 * 99_999 / 2);
    }

    #[test]
    fn a_thread_that_is_held_up_holds_up_one_item() {
        let pool = Pool::new(2).unwrap();
        let rest = AtomicUsize::new(0);
        // The first item ends only once all others have: some thread must go on without its owner.
        pool.for_each(50, &|_, item| {
            if item > 0 {
                rest.fetch_add(1, SeqCst);
            }
            while item == 0 && rest.load(SeqCst) < 49 {
                thread::yield_now();
            }
        });
        assert_eq!(rest.load(SeqCst), 49);
    }

    #[test]
    fn parked_workers_wake() {
        let pool = Pool::new(3).unwrap();
        let count = AtomicUsize::new(0);
        for _ in 0..5 {
            thread::sleep(Duration::from_millis(3));
            // Nobody is done before all three have begun: the sleepers must have come.
            let begun = AtomicUsize::new(0);
            pool.for_each(3, &|_, item| {
                begun.fetch_add(1, SeqCst);
                while begun.load(SeqCst) < 3 {
                    thread::yield_now();
                }
                // The caller outlasts its own spinning too.
                thread::sleep(Duration::from_millis(item as u64));
                count.fetch_add(1, SeqCst);
            });
        }
        assert_eq!(count.load(SeqCst), 15);
    }

    #[test]
    fn idle_workers_use_no_cpu() {
        let pool = Pool::new(2).unwrap();
        pool.for_each(2, &|_, _| {});
        let start = Instant::now();
        while !pool.regions.gates[0].parked.load(SeqCst) {
            assert!(start.elapsed() < Duration::from_secs(10), "still spinning");
            thread::sleep(Duration::from_millis(1));
        }
    }

    #[test]
    fn a_panic_reaches_the_caller_and_the_pool_lives_on() {
        let pool = Pool::new(3).unwrap();
        for bad in 0..3 {
            let run = || pool.for_each(3, &|_, item| assert!(item != bad, "item {item}"));
            let outcome = catch_unwind(AssertUnwindSafe(run));
            let message = *outcome.unwrap_err().downcast::<String>().unwrap();
            assert_eq!(message, format!("item {bad}"));
        }
        let count = AtomicUsize::new(0);
        pool.for_each(100, &|_, _| {
            count.fetch_add(1, SeqCst);
        });
        assert_eq!(count.load(SeqCst), 100);
    }

    #[test]
    fn regions_nest_and_callers_take_turns() {
        let pool = Pool::new(2).unwrap();
        let count = AtomicUsize::new(0);
        let inner = |_, _| {
            count.fetch_add(1, SeqCst);
        };
        thread::scope(|scope| {
            for _ in 0..3 {
                scope.spawn(|| {
                    (0..100).for_each(|_| pool.for_each(2, &|_, _| pool.for_each(2, &inner)));
                });
            }
        });
        assert_eq!(count.load(SeqCst), 3 * 100 * 4);
    }
}
