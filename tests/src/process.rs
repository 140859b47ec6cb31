//! A child process that lives no longer than its value.

use rustix::process::{Pid, Signal, kill_process};
use std::{
    io::{BufRead, BufReader, PipeReader, Read, Write, pipe},
    path::{Path, PathBuf},
    process::{Child, ChildStderr, ChildStdout, Command, ExitStatus, Stdio},
    sync::{Arc, Mutex, mpsc},
    thread,
    time::{Duration, Instant},
};

/// Fetching the demo model on a slow line is part of a start.
const START_DEADLINE: Duration = Duration::from_secs(900);

/// The binary beside the tests' own folder.
pub fn lockstep() -> PathBuf {
    let tests = std::env::current_exe().expect("the test's own path");
    let build = tests.parent().and_then(|deps| deps.parent()).expect("a build folder");
    let binary = build.join("lockstep");
    assert!(binary.exists(), "no {}: run `./dev test`, which builds it", binary.display());
    binary
}

/// A pipe that is full and stays so until its reading end is dropped: whoever writes to it, by
/// either of the two ends for a child's output, waits.
pub fn full_pipe() -> (PipeReader, [Stdio; 2]) {
    let (reader, mut writer) = pipe().expect("a pipe");
    let ends = [(); 2].map(|()| Stdio::from(writer.try_clone().expect("another descriptor")));
    // The thread ends with the reading end.
    thread::spawn(move || while writer.write_all(&[b'x'; 4096]).is_ok() {});
    (reader, ends)
}

/// Sends a signal by its short name, e.g. `INT`: at once, since tests choose the moment.
pub fn signal(process: u32, name: &str) {
    let number = match name {
        "CONT" => Signal::CONT,
        "INT" => Signal::INT,
        "KILL" => Signal::KILL,
        "STOP" => Signal::STOP,
        "TERM" => Signal::TERM,
        _ => panic!("no test has sent {name} so far"),
    };
    let pid = i32::try_from(process).ok().and_then(Pid::from_raw).expect("a process");
    kill_process(pid, number).unwrap_or_else(|error| panic!("{name} to {process}: {error}"));
}

/// Whether there is a process of that number, ended and not waited for included.
pub fn is_there(process: u32) -> bool {
    Path::new("/proc").join(process.to_string()).exists()
}

/// What a process has logged so far.
#[derive(Clone, Debug, Default)]
pub struct Log {
    text: Arc<Mutex<String>>,
}

impl Log {
    pub fn text(&self) -> String {
        self.text.lock().expect("no panic in there").clone()
    }
}

/// A running child, killed with the value.
pub struct Process {
    child: Child,
    /// The ready line of `lockstep`; empty for others.
    ready: String,
}

impl Process {
    /// Runs any program without input.
    pub fn spawn(command: &mut Command) -> Self {
        let child = command.stdin(Stdio::null()).spawn();
        let child = child.unwrap_or_else(|error| panic!("{command:?}: {error}"));
        Self { child, ready: String::new() }
    }

    /// Runs `lockstep` and waits for its ready line.
    pub fn lockstep(arguments: &[&str]) -> Self {
        Self::started(Command::new(lockstep()).args(arguments))
    }

    /// The same, with an environment of one's choice.
    pub fn started(command: &mut Command) -> Self {
        let mut process = Self::spawn(command.stdout(Stdio::piped()));
        process.ready = first_line(process.output());
        assert!(process.ready.starts_with("ready "), "{command:?}: {:?}", process.ready);
        process
    }

    /// As [`Self::lockstep`], and keeps what it logs.
    pub fn logged(arguments: &[&str]) -> (Self, Log) {
        let mut command = Command::new(lockstep());
        command.args(arguments).stdout(Stdio::piped()).stderr(Stdio::piped());
        let (mut process, log) = Self::spawn_logged(&mut command);
        process.ready = first_line(process.output());
        assert!(process.ready.starts_with("ready "), "{arguments:?}: {}", log.text());
        (process, log)
    }

    /// Runs any program whose standard error is a pipe, and keeps what it says there.
    pub fn spawn_logged(command: &mut Command) -> (Self, Log) {
        let log = Log::default();
        (Self::spawn_logging(command, &log), log)
    }

    /// As [`Self::spawn_logged`], into a log that others may write to.
    pub fn spawn_logging(command: &mut Command, log: &Log) -> Self {
        let mut process = Self::spawn(command.stderr(Stdio::piped()));
        let stderr = BufReader::new(process.child.stderr.take().expect("a pipe"));
        let lines = log.clone();
        thread::spawn(move || {
            for line in stderr.lines().map_while(Result::ok) {
                lines.text.lock().expect("no panic in here").push_str(&format!("{line}\n"));
            }
        });
        process
    }

    /// The processes that it has started and that have not ended, by age.
    pub fn children(&self) -> Vec<u32> {
        let processes = std::fs::read_dir("/proc").expect("the processes");
        let numbers = processes.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok());
        let parent = self.pid().to_string();
        let mut children: Vec<u32> = numbers
            .filter(|process: &u32| {
                // The name stands in parentheses; the state and the parent follow.
                let stat = std::fs::read_to_string(format!("/proc/{process}/stat"));
                let stat = stat.unwrap_or_default();
                let mut fields = stat.rsplit(')').next().unwrap_or_default().split_whitespace();
                let state = fields.next();
                state.is_some_and(|state| state != "Z") && fields.next() == Some(&parent)
            })
            .collect();
        children.sort_unstable();
        children
    }

    /// Runs `lockstep up` with the demo model on ports of its own.
    pub fn up(flags: &[&str]) -> Self {
        let up = ["up", "--model", "demo", "--http", "127.0.0.1:0", "--grpc", "127.0.0.1:0"];
        Self::lockstep(&[&up, flags].concat())
    }

    /// `host:port` behind `name=http://` or `name=https://` in the ready line.
    pub fn address(&self, name: &str) -> &str {
        let value = |word| {
            let url = str::strip_prefix(word, name)?;
            url.strip_prefix("=http://").or_else(|| url.strip_prefix("=https://"))
        };
        let found = self.ready.split_whitespace().find_map(value);
        found.unwrap_or_else(|| panic!("no {name} in {:?}", self.ready))
    }

    /// The ready line.
    pub fn ready(&self) -> &str {
        &self.ready
    }

    fn output(&mut self) -> ChildStdout {
        self.child.stdout.take().expect("a pipe")
    }

    /// Runs a program to its end: how it ended, and its standard output.
    pub fn run(command: &mut Command, deadline: Duration) -> (ExitStatus, String) {
        let mut process = Self::spawn(command.stdout(Stdio::piped()));
        let mut output = process.output();
        let reader = thread::spawn(move || {
            let mut text = String::new();
            output.read_to_string(&mut text).map(|_| text)
        });
        let status = process.wait(deadline);
        (status, reader.join().expect("the reader ends").expect("text"))
    }

    /// Both pipes of a child that was given them.
    pub fn outputs(&mut self) -> (ChildStdout, ChildStderr) {
        (self.output(), self.child.stderr.take().expect("a pipe"))
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Sends a signal by its short name, e.g. `INT`.
    pub fn signal(&self, name: &str) {
        signal(self.pid(), name);
    }

    /// Resident memory, in bytes.
    pub fn resident(&self) -> u64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.pid()));
        let status = status.expect("a running process");
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).expect("VmRSS");
        let kilobytes: u64 = line.trim().trim_end_matches(" kB").parse().expect("a number");
        kilobytes * 1024
    }

    /// Whether it has ended, waited for or not.
    pub fn has_ended(&self) -> bool {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", self.pid()));
        let stat = stat.unwrap_or_default();
        // The name stands in parentheses; the state follows.
        let state = stat.rsplit(')').next().unwrap_or_default().trim_start().chars().next();
        matches!(state, None | Some('Z' | 'X'))
    }

    /// How it ended, once it has.
    pub fn ended(&mut self) -> Option<ExitStatus> {
        self.child.try_wait().expect("a child of ours")
    }

    /// How it ended.
    pub fn wait(&mut self, deadline: Duration) -> ExitStatus {
        let began = Instant::now();
        loop {
            if let Some(status) = self.ended() {
                return status;
            }
            assert!(began.elapsed() < deadline, "no end within {deadline:?}");
            thread::sleep(Duration::from_millis(50));
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // Fails only where it has ended already.
        let _ended = self.child.kill();
        let _status = self.child.wait();
    }
}

/// The first line of the output. What follows is read too, so that the child never waits for us.
fn first_line(output: ChildStdout) -> String {
    let (sender, receiver) = mpsc::channel();
    thread::spawn(move || {
        let mut output = BufReader::new(output);
        let mut line = String::new();
        let _ended = output.read_line(&mut line);
        let _timed_out = sender.send(line);
        let _ended = std::io::copy(&mut output, &mut std::io::sink());
    });
    receiver.recv_timeout(START_DEADLINE).expect("no ready line in time")
}
