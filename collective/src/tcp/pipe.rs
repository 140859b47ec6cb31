//! A connection's bytes, with TLS or without.

use std::{
    io::{self, Read, Write},
    net::TcpStream,
    time::{Duration, Instant},
};

use tls::{
    Fault, Reason, TLS_FIRST_BYTE,
    rustls::{ClientConnection, Connection, ServerConnection},
};

/// One socket, read and written by one thread.
pub(super) struct Pipe {
    socket: TcpStream,
    tls: Option<Box<Connection>>,
}

impl Pipe {
    pub fn plain(socket: TcpStream) -> io::Result<Self> {
        socket.set_nonblocking(false)?;
        socket.set_nodelay(true)?;
        Ok(Self { socket, tls: None })
    }

    /// Towards rank 0 at `host`, within `limit`.
    pub fn dial(
        socket: TcpStream,
        host: &str,
        tls: &tls::Client,
        limit: Duration,
    ) -> Result<Self, Fault> {
        let name = tls.name(host)?;
        let begun = ClientConnection::new(tls.config(), name).map_err(|e| Fault::from(&e))?;
        Self::plain(socket).map_err(left)?.secured(begun.into(), limit)
    }

    /// With whoever has called, within `limit`.
    pub fn answer(socket: TcpStream, tls: &tls::Server, limit: Duration) -> Result<Self, Fault> {
        let pipe = Self::plain(socket).map_err(left)?;
        pipe.socket.set_read_timeout(Some(limit)).map_err(left)?;
        let mut first = [0];
        match pipe.socket.peek(&mut first) {
            Ok(1) if first[0] != TLS_FIRST_BYTE => {
                let text = "it does not speak TLS, which the ranks of this group do; give it \
                            --cluster-cert, --cluster-key and --cluster-ca";
                return Err(Fault::new(Reason::PlainText, text));
            }
            Ok(1..) => {}
            Ok(0) => return Err(Fault::new(Reason::Closed, "it left without a word")),
            Err(error) => return Err(left(error)),
        }
        let begun = ServerConnection::new(tls.config()).map_err(|e| Fault::from(&e))?;
        pipe.secured(begun.into(), limit)
    }

    fn secured(mut self, mut tls: Connection, limit: Duration) -> Result<Self, Fault> {
        let start = Instant::now();
        while tls.is_handshaking() || tls.wants_write() {
            let rest = limit.saturating_sub(start.elapsed());
            if rest.is_zero() {
                return Err(left(io::ErrorKind::TimedOut.into()));
            }
            self.socket.set_read_timeout(Some(rest)).map_err(left)?;
            self.socket.set_write_timeout(Some(rest)).map_err(left)?;
            if tls.wants_write() {
                tls.write_tls(&mut self.socket).map_err(left)?;
                continue;
            }
            if tls.read_tls(&mut self.socket).map_err(left)? == 0 {
                return Err(left(io::ErrorKind::UnexpectedEof.into()));
            }
            if let Err(error) = tls.process_new_packets() {
                // The other side hears why, where it still listens.
                let _told = tls.write_tls(&mut self.socket);
                return Err(Fault::from(&error));
            }
        }
        self.tls = Some(Box::new(tls));
        Ok(self)
    }

    pub fn socket(&self) -> &TcpStream {
        &self.socket
    }
}

/// The other side went, or was too slow.
fn left(error: io::Error) -> Fault {
    use io::ErrorKind::{TimedOut, WouldBlock};
    match error.kind() {
        TimedOut | WouldBlock => Fault::new(Reason::Deadline, "no TLS handshake in time"),
        _ => Fault::new(Reason::Closed, format!("it left in the TLS handshake: {error}")),
    }
}

impl Read for Pipe {
    fn read(&mut self, to: &mut [u8]) -> io::Result<usize> {
        let Some(tls) = &mut self.tls else { return self.socket.read(to) };
        loop {
            match tls.reader().read(to) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                read => return read,
            }
            push(tls, &mut self.socket)?;
            tls.read_tls(&mut self.socket)?;
            tls.process_new_packets()
                .map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))?;
        }
    }
}

impl Write for Pipe {
    /// With TLS the bytes leave with the next ones, or with `flush`.
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let Some(tls) = &mut self.tls else { return self.socket.write(bytes) };
        push(tls, &mut self.socket)?;
        tls.writer().write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        match &mut self.tls {
            None => Ok(()),
            Some(tls) => push(tls, &mut self.socket),
        }
    }
}

/// What is encrypted leaves; what the socket does not take in time stays for the next attempt.
fn push(tls: &mut Connection, socket: &mut TcpStream) -> io::Result<()> {
    while tls.wants_write() {
        if tls.write_tls(socket)? == 0 {
            return Err(io::ErrorKind::WriteZero.into());
        }
    }
    Ok(())
}
