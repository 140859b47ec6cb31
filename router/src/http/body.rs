//! Bodies of requests that come back when their reader lets go of them, and bodies of answers that
//! end with the client's connection.

use axum::body::{Body, HttpBody};
use bytes::Bytes;
use futures_util::{Stream, stream::BoxStream};
use http_body_util::BodyExt;
use hyper::body::{Frame, Incoming, SizeHint};
use std::{
    io,
    pin::Pin,
    task::{Context, Poll},
};
use tokio::sync::oneshot;

/// What a reader left of a request's body.
pub(super) struct Unread {
    body: Incoming,
    /// Whether some of it was asked for.
    pub begun: bool,
}

/// The body for a reader, and where the rest comes back; nothing comes back of an empty one.
pub(super) fn hand_over(body: Incoming) -> (Body, Option<oneshot::Receiver<Unread>>) {
    if body.is_end_stream() {
        return (Body::empty(), None);
    }
    let (sender, back) = oneshot::channel();
    let unread = Unread { body, begun: false };
    (Body::new(HandlerBody(Some((unread, sender)))), Some(back))
}

impl Unread {
    /// The rest, once the reader is done with the body.
    pub fn take(mut back: oneshot::Receiver<Self>) -> Option<Self> {
        back.try_recv().ok()
    }

    /// Reads on, so many bytes at most; true at the body's end.
    pub async fn discard(mut self, most: usize) -> bool {
        let mut left = most;
        loop {
            match self.body.frame().await {
                None => return true,
                Some(Err(_)) => return false,
                Some(Ok(frame)) => match left.checked_sub(frame.data_ref().map_or(0, Bytes::len)) {
                    Some(rest) => left = rest,
                    None => return false,
                },
            }
        }
    }
}

/// A request's body in the hands of its reader.
struct HandlerBody(Option<(Unread, oneshot::Sender<Unread>)>);

impl Drop for HandlerBody {
    fn drop(&mut self) {
        if let Some((unread, back)) = self.0.take() {
            // Nobody waits for it any more when the client is gone.
            let _gone = back.send(unread);
        }
    }
}

impl HttpBody for HandlerBody {
    type Data = Bytes;
    type Error = hyper::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, hyper::Error>>> {
        let Some((unread, _)) = &mut self.0 else { return Poll::Ready(None) };
        unread.begun = true;
        Pin::new(&mut unread.body).poll_frame(cx)
    }

    fn is_end_stream(&self) -> bool {
        self.0.as_ref().is_none_or(|(unread, _)| unread.body.is_end_stream())
    }

    fn size_hint(&self) -> SizeHint {
        self.0.as_ref().map_or_else(SizeHint::default, |(unread, _)| unread.body.size_hint())
    }
}

/// In a stream of events: a comment.
const COMMENT: &[u8] = b": there?\n\n";

/// An answer that is streamed while the connection stands. A write that fails says so as well, but
/// only a stream that has something to say writes: a stream of events may say a comment.
pub(super) struct UntilBroken<F> {
    body: Body,
    broken: F,
    /// When to say one.
    probes: Option<BoxStream<'static, ()>>,
}

impl<F: Future<Output = ()> + Unpin> UntilBroken<F> {
    pub fn new(body: Body, broken: F, probes: Option<BoxStream<'static, ()>>) -> Self {
        Self { body, broken, probes }
    }
}

impl<F: Future<Output = ()> + Unpin> HttpBody for UntilBroken<F> {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        let frame = Pin::new(&mut self.body).poll_frame(cx);
        if frame.is_ready() {
            return frame;
        }
        if Pin::new(&mut self.broken).poll(cx).is_ready() {
            let gone = io::Error::from(io::ErrorKind::ConnectionAborted);
            return Poll::Ready(Some(Err(axum::Error::new(gone))));
        }
        if let Some(probes) = &mut self.probes
            && let Poll::Ready(Some(())) = Pin::new(probes).poll_next(cx)
        {
            return Poll::Ready(Some(Ok(Frame::data(Bytes::from_static(COMMENT)))));
        }
        Poll::Pending
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}
