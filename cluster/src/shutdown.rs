//! Turns signals into a value that every part can watch.

use std::io;

use tokio::{
    signal::unix::{SignalKind, signal},
    sync::watch,
};

/// Becomes true at the first SIGINT or SIGTERM. The second ends the process at once, with the exit
/// status that a shell gives to a process which that signal ended.
///
/// # Errors
/// The handlers cannot be installed.
pub fn signals() -> io::Result<watch::Receiver<bool>> {
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut terminate = signal(SignalKind::terminate())?;
    let (sender, receiver) = watch::channel(false);
    tokio::spawn(async move {
        loop {
            let number = tokio::select! {
                _ = interrupt.recv() => SignalKind::interrupt().as_raw_value(),
                _ = terminate.recv() => SignalKind::terminate().as_raw_value(),
            };
            if sender.send_replace(true) {
                tracing::warn!("second signal: ending at once");
                crate::telemetry::exit(128 + number);
            }
            tracing::info!("draining; a second signal ends the process at once");
        }
    });
    Ok(receiver)
}

/// Returns once `shutdown` is true or can no longer become so.
pub async fn requested(shutdown: &mut watch::Receiver<bool>) {
    // An error means that the sender is gone, which ends the wait as well.
    let _closed = shutdown.wait_for(|&stop| stop).await;
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::{process::Command, time::Duration};

    #[tokio::test]
    async fn a_termination_signal_is_seen_by_every_watcher() {
        let first = signals().unwrap();
        let mut second = first.clone();
        assert!(!*first.borrow());
        // The shell's own: the program `kill` is not on every machine.
        let kill = format!("kill -TERM {}", std::process::id());
        assert!(Command::new("sh").args(["-c", &kill]).status().unwrap().success());
        tokio::time::timeout(Duration::from_secs(5), requested(&mut second)).await.unwrap();
        assert!(*first.borrow());
    }

    #[tokio::test]
    async fn a_dropped_sender_ends_the_wait() {
        let (sender, mut receiver) = watch::channel(false);
        drop(sender);
        tokio::time::timeout(Duration::from_secs(5), requested(&mut receiver)).await.unwrap();
    }
}
