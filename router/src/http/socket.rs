//! A connection's socket, shared by hyper and by what watches whether the client is still there.
//!
//! A client that closed its socket and one that only shut down its sending side look the same: the
//! end of its data. They differ once something is sent, since a closed socket answers with a reset.
//! Every answer of HTTP/1 begins with the same bytes, so that those can be sent ahead one by one
//! while the answer is still being made. Under TLS there is nothing to tell apart, nor anything
//! that could be sent beside it: a client that ends its side there, which TLS 1.2 answers in kind,
//! left.

use futures_util::{
    StreamExt,
    stream::{BoxStream, unfold},
};
use socket2::SockRef;
use std::{
    io::{self, ErrorKind, IoSlice},
    net::Shutdown,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering::Relaxed},
    },
    task::{Context, Poll, ready},
    time::Duration,
};
use tokio::{
    io::{AsyncRead, AsyncWrite, Interest, ReadBuf},
    net::TcpStream,
    time::{sleep, timeout},
};

/// What every status line begins with.
const STATUS_LINE: &[u8] = b"HTTP/1.";
/// Pauses before each of its bytes: a client may leave at any time after it shut down its side.
const AHEAD_SECONDS: [u64; STATUS_LINE.len()] = [0, 1, 3, 10, 30, 60, 120];
/// Between two looks for the end of data behind a request that waits for its turn.
const LOOK_AGAIN: Duration = Duration::from_secs(1);
/// How long a client may still send after the last answer. A socket that is closed with unread
/// data in it resets the connection, and the client loses the answer.
const LINGER: Duration = Duration::from_secs(5);

/// One client's connection.
#[derive(Clone)]
pub(super) struct Socket(Arc<SocketState>);

struct SocketState {
    stream: TcpStream,
    /// What is read and written is TLS.
    secure: bool,
    /// Bytes of the next answer's status line that are sent already.
    ahead: AtomicUsize,
    /// Whether everything that hyper wrote has left.
    flushed: AtomicBool,
}

impl Socket {
    pub fn new(stream: TcpStream, secure: bool) -> Self {
        let (ahead, flushed) = (AtomicUsize::new(0), AtomicBool::new(true));
        Self(Arc::new(SocketState { stream, secure, ahead, flushed }))
    }

    /// Returns once the connection is broken.
    pub async fn broken(&self) {
        // An error here is a broken connection, too.
        drop(self.0.stream.ready(Interest::ERROR).await);
    }

    /// Returns once the client is gone. Only for a request of HTTP/1 that has no answer yet.
    pub async fn gone(&self) {
        tokio::select! {
            () = self.broken() => {}
            () = self.probe() => {}
        }
    }

    /// Once the client sends no more, provokes the reset of a closed socket. Ends only under TLS,
    /// where no more is needed.
    async fn probe(&self) {
        if self.0.secure && self.half_closed().await.is_ok() {
            return;
        }
        let mut probes = self.clone().probes();
        while probes.next().await.is_some() {
            self.send_ahead();
        }
        std::future::pending().await
    }

    /// Moments at which something should be sent, if anything can be: once the client sends no
    /// more, whether it is gone shows by that alone.
    pub fn probes(self) -> BoxStream<'static, ()> {
        let pauses = AHEAD_SECONDS.into_iter();
        let probes = unfold((self, pauses, true), |(socket, mut pauses, first)| async move {
            if first {
                socket.half_closed().await.ok()?;
            }
            sleep(Duration::from_secs(pauses.next()?)).await;
            Some(((), (socket, pauses, false)))
        });
        probes.boxed()
    }

    async fn half_closed(&self) -> io::Result<()> {
        while self.0.stream.peek(&mut [0]).await? > 0 {
            // The body, or the next request. The end may have come behind it.
            if self.0.stream.ready(Interest::READABLE).await?.is_read_closed() {
                break;
            }
            sleep(LOOK_AGAIN).await;
        }
        Ok(())
    }

    fn send_ahead(&self) {
        let sent = self.0.ahead.load(Relaxed);
        // The answer before this one comes first; without room nothing is known, nor lost.
        if self.0.flushed.load(Relaxed)
            && sent < STATUS_LINE.len()
            && let Ok(1) = self.0.stream.try_write(&STATUS_LINE[sent..=sent])
        {
            self.0.ahead.store(sent + 1, Relaxed);
        }
    }

    /// Of bytes to be written, how many were sent ahead.
    fn skip(&self, length: usize) -> Option<usize> {
        self.0.flushed.store(false, Relaxed);
        let ahead = self.0.ahead.load(Relaxed);
        let skipped = ahead.min(length);
        self.0.ahead.store(ahead - skipped, Relaxed);
        (skipped > 0).then_some(skipped)
    }

    fn poll_write(
        &self,
        cx: &mut Context<'_>,
        write: impl Fn(&TcpStream) -> io::Result<usize>,
    ) -> Poll<io::Result<usize>> {
        loop {
            ready!(self.0.stream.poll_write_ready(cx))?;
            match write(&self.0.stream) {
                Err(error) if error.kind() == ErrorKind::WouldBlock => {}
                written => return Poll::Ready(written),
            }
        }
    }

    fn shut_down(&self) -> io::Result<()> {
        SockRef::from(&self.0.stream).shutdown(Shutdown::Write)
    }

    /// Says that no more answers come, and takes what the client still sends for a while.
    pub async fn linger(&self) {
        if self.shut_down().is_err() {
            return;
        }
        let stream = &self.0.stream;
        let rest = async {
            let mut sink = vec![0; 16 << 10];
            while stream.readable().await.is_ok() {
                match stream.try_read(&mut sink) {
                    Ok(1..) => {}
                    Err(error) if error.kind() == ErrorKind::WouldBlock => {}
                    _ => return,
                }
            }
        };
        // Whoever still sends by then has had its answer for long.
        let _passed = timeout(LINGER, rest).await;
    }
}

impl AsyncRead for Socket {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        loop {
            ready!(self.0.stream.poll_read_ready(cx))?;
            match self.0.stream.try_read_buf(buffer) {
                Err(error) if error.kind() == ErrorKind::WouldBlock => {}
                read => return Poll::Ready(read.map(|_| ())),
            }
        }
    }
}

impl AsyncWrite for Socket {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        match self.skip(bytes.len()) {
            Some(skipped) => Poll::Ready(Ok(skipped)),
            None => Socket::poll_write(&self, cx, |stream| stream.try_write(bytes)),
        }
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        match self.skip(slices.iter().map(|slice| slice.len()).sum()) {
            Some(skipped) => Poll::Ready(Ok(skipped)),
            None => Socket::poll_write(&self, cx, |stream| stream.try_write_vectored(slices)),
        }
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.0.flushed.store(true, Relaxed);
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(self.shut_down())
    }
}
