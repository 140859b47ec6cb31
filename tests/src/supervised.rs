//! A process that is started again whenever it ends, as Kubernetes and systemd do it.

use std::{
    process::Command,
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
        mpsc::{RecvTimeoutError, Sender, channel},
    },
    thread::{self, JoinHandle},
    time::Duration,
};

use crate::{Log, Process};

/// Between two looks at the process.
const LOOK: Duration = Duration::from_millis(20);
/// Before it is started again.
const PAUSE: Duration = Duration::from_millis(500);

/// It ends with the value.
pub struct Supervised {
    /// Of all its processes.
    pub log: Log,
    starts: Arc<AtomicUsize>,
    process: Arc<Mutex<Process>>,
    /// Dropped to end it.
    running: Option<Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Supervised {
    /// Starts what `command` makes.
    pub fn start(command: impl Fn() -> Command + Send + 'static) -> Self {
        let log = Log::default();
        let starts = Arc::new(AtomicUsize::new(1));
        let process = Arc::new(Mutex::new(Process::spawn_logging(&mut command(), &log)));
        let (running, stop) = channel::<()>();
        let (counted, current, lines) = (starts.clone(), process.clone(), log.clone());
        let thread = thread::spawn(move || {
            let paused = |pause| stop.recv_timeout(pause) == Err(RecvTimeoutError::Timeout);
            while paused(LOOK) {
                let ended = current.lock().expect("no panic in here").ended();
                if ended.is_some() && paused(PAUSE) {
                    counted.fetch_add(1, Ordering::SeqCst);
                    let next = Process::spawn_logging(&mut command(), &lines);
                    *current.lock().expect("no panic in here") = next;
                }
            }
        });
        Self { log, starts, process, running: Some(running), thread: Some(thread) }
    }

    /// How often it was started.
    pub fn starts(&self) -> usize {
        self.starts.load(Ordering::SeqCst)
    }

    /// The process that runs, or ran last.
    pub fn pid(&self) -> u32 {
        self.process.lock().expect("no panic in there").pid()
    }
}

impl Drop for Supervised {
    fn drop(&mut self) {
        self.running = None;
        if let Some(thread) = self.thread.take() {
            let ended = thread.join();
            assert!(ended.is_ok() || thread::panicking(), "the supervisor's thread panicked");
        }
    }
}
