//! Threads that run one function together, hundreds of times a token.
//!
//! A region costs about a microsecond while the workers are hot: they spin on a counter between
//! regions, and only after `SPIN` without work do they park, so that an idle server uses no CPU.
//! Spinning yields the core now and then, so a machine with fewer free cores than threads moves on.
//! A region inside a region runs on the calling thread alone.

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

/// A region's function, its lifetime erased.
type Job = *const (dyn Fn(usize) + Sync);

/// What a worker and the caller see of each other, one cache line apart from other workers'.
#[repr(align(128))]
struct Gate {
    parked: AtomicBool,
}

struct Shared {
    /// Counts regions; a change is the signal to run `job`.
    epoch: AtomicU64,
    job: UnsafeCell<Option<Job>>,
    /// Workers that have not finished the region.
    busy: AtomicUsize,
    /// Whether the caller gave up spinning for `busy` to reach 0.
    caller_parked: AtomicBool,
    caller: Mutex<Option<Thread>>,
    panic: Mutex<Option<Box<dyn Any + Send>>>,
    gates: Vec<Gate>,
    stop: AtomicBool,
}

// SAFETY: `job` is written by the caller before it bumps `epoch` and read by workers after they saw
// the bump; it is next written only once `busy` fell to 0, after every worker's last read. The
// pointer is to a `Sync` function that outlives the region, because `run` returns after `busy` fell
// to 0.
unsafe impl Sync for Shared {}
// SAFETY: as above; nothing in `Shared` is tied to the thread that made it.
unsafe impl Send for Shared {}

thread_local! {
    /// Whether this thread is inside a region, of any pool.
    static IN_REGION: Cell<bool> = const { Cell::new(false) };
}

/// A fixed number of threads, the caller among them.
pub struct Pool {
    shared: Arc<Shared>,
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

/// Runs `f(index)`, keeping the first panic for the caller.
fn run_one(shared: &Shared, f: &(dyn Fn(usize) + Sync), index: usize) {
    let outer = IN_REGION.replace(true);
    let outcome = catch_unwind(AssertUnwindSafe(|| f(index)));
    IN_REGION.set(outer);
    if let Err(panic) = outcome {
        shared.panic.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(panic);
    }
}

/// One worker's life: `index` counts from 1, the caller being 0.
fn work(shared: &Shared, index: usize) {
    let parked = &shared.gates[index - 1].parked;
    let mut seen = 0;
    loop {
        let changed = || shared.epoch.load(SeqCst) != seen;
        if !spin_until(changed) {
            park_until(parked, changed);
        }
        if shared.stop.load(SeqCst) {
            return;
        }
        seen += 1;
        // SAFETY: `epoch` changed, so the caller wrote `job` before and waits for `busy` before it
        // writes again or lets the function go.
        let job = unsafe { (*shared.job.get()).map(|job| &*job) };
        if let Some(job) = job {
            run_one(shared, job, index);
        }
        if shared.busy.fetch_sub(1, SeqCst) == 1 && shared.caller_parked.swap(false, SeqCst) {
            let caller = shared.caller.lock().unwrap_or_else(PoisonError::into_inner);
            if let Some(caller) = caller.as_ref() {
                caller.unpark();
            }
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
        let shared = Arc::new(Shared {
            epoch: AtomicU64::new(0),
            job: UnsafeCell::new(None),
            busy: AtomicUsize::new(0),
            caller_parked: AtomicBool::new(false),
            caller: Mutex::new(None),
            panic: Mutex::new(None),
            gates: (0..extra).map(|_| Gate { parked: AtomicBool::new(false) }).collect(),
            stop: AtomicBool::new(false),
        });
        let mut pool = Self { shared, workers: Vec::with_capacity(extra), turn: Mutex::new(()) };
        for index in 1..=extra {
            let shared = Arc::clone(&pool.shared);
            let named = thread::Builder::new().name(format!("kernel-{index}"));
            pool.workers.push(named.spawn(move || work(&shared, index))?);
        }
        Ok(pool)
    }

    /// Threads, the caller's among them.
    pub fn threads(&self) -> usize {
        self.shared.gates.len() + 1
    }

    /// Runs `f(0)`, `f(1)` … `f(threads - 1)`, each on its own thread, and returns when all are
    /// done.
    ///
    /// # Panics
    /// With the panic of `f`, once every thread is done.
    pub fn run(&self, f: &(dyn Fn(usize) + Sync)) {
        let threads = self.threads();
        if threads == 1 || IN_REGION.get() {
            return (0..threads).for_each(f);
        }
        let turn = self.turn.lock().unwrap_or_else(PoisonError::into_inner);
        let shared = &*self.shared;
        // SAFETY: only the lifetime changes; nobody follows the pointer after this function
        // returns, because it waits for `busy` to reach 0 and cannot unwind before.
        let job = unsafe { std::mem::transmute::<&(dyn Fn(usize) + Sync), Job>(f) };
        // SAFETY: no worker reads `job` between regions, and `turn` keeps other callers out.
        unsafe { *shared.job.get() = Some(job) };
        shared.busy.store(threads - 1, SeqCst);
        self.signal();
        run_one(shared, f, 0);
        self.wait();
        let panic = shared.panic.lock().unwrap_or_else(PoisonError::into_inner).take();
        drop(turn);
        if let Some(panic) = panic {
            resume_unwind(panic);
        }
    }

    /// Runs `f(thread, item)` for every item below `items`, whichever thread is free taking the
    /// next.
    pub fn for_each(&self, items: usize, f: &(dyn Fn(usize, usize) + Sync)) {
        if items <= 1 || self.threads() == 1 {
            return (0..items).for_each(|item| f(0, item));
        }
        let next = AtomicUsize::new(0);
        self.run(&|thread| {
            loop {
                let item = next.fetch_add(1, SeqCst);
                if item >= items {
                    return;
                }
                f(thread, item);
            }
        });
    }

    /// Tells every worker of a new epoch.
    fn signal(&self) {
        self.shared.epoch.fetch_add(1, SeqCst);
        for (gate, worker) in self.shared.gates.iter().zip(&self.workers) {
            if gate.parked.swap(false, SeqCst) {
                worker.thread().unpark();
            }
        }
    }

    /// Waits for the workers to finish the region.
    fn wait(&self) {
        let shared = &*self.shared;
        let done = || shared.busy.load(SeqCst) == 0;
        if spin_until(done) {
            return;
        }
        *shared.caller.lock().unwrap_or_else(PoisonError::into_inner) = Some(thread::current());
        park_until(&shared.caller_parked, done);
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.shared.stop.store(true, SeqCst);
        self.signal();
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
    fn every_index_runs_once_in_each_of_many_regions() {
        for threads in 1..=5 {
            let pool = Pool::new(threads).unwrap();
            let counts: Vec<_> = (0..threads).map(|_| AtomicUsize::new(0)).collect();
            for _ in 0..2000 {
                pool.run(&|i| {
                    counts[i].fetch_add(1, SeqCst);
                });
            }
            assert!(counts.iter().all(|c| c.load(SeqCst) == 2000));
        }
    }

    #[test]
    fn parked_workers_wake() {
        let pool = Pool::new(3).unwrap();
        let count = AtomicUsize::new(0);
        for _ in 0..5 {
            thread::sleep(Duration::from_millis(3));
            pool.run(&|i| {
                // The caller outlasts its own spinning too.
                thread::sleep(Duration::from_millis(i as u64));
                count.fetch_add(1, SeqCst);
            });
        }
        assert_eq!(count.load(SeqCst), 15);
    }

    #[test]
    fn idle_workers_use_no_cpu() {
        let pool = Pool::new(2).unwrap();
        pool.run(&|_| {});
        let start = Instant::now();
        while !pool.shared.gates[0].parked.load(SeqCst) {
            assert!(start.elapsed() < Duration::from_secs(10), "still spinning");
            thread::sleep(Duration::from_millis(1));
        }
    }

    #[test]
    fn a_panic_reaches_the_caller_and_the_pool_lives_on() {
        let pool = Pool::new(3).unwrap();
        for bad in 0..3 {
            let outcome =
                catch_unwind(AssertUnwindSafe(|| pool.run(&|i| assert!(i != bad, "thread {i}"))));
            let message = *outcome.unwrap_err().downcast::<String>().unwrap();
            assert_eq!(message, format!("thread {bad}"));
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
        let inner = |_| {
            count.fetch_add(1, SeqCst);
        };
        thread::scope(|scope| {
            for _ in 0..3 {
                scope.spawn(|| (0..100).for_each(|_| pool.run(&|_| pool.run(&inner))));
            }
        });
        assert_eq!(count.load(SeqCst), 3 * 100 * 4);
    }
}
