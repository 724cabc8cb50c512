//! What a control channel runs over: the bare connection, or TLS on top of it.

use std::{
    io,
    pin::Pin,
    task::{Context, Poll},
};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio_rustls::TlsStream;

use super::{ControlError, StreamChannel};
use crate::{datapath::Secret, pki::Certified};

/// Label of the page stream's secret (RFC 8446, section 7.5; names with `EXPORTER-` as RFC 5705 asks).
const PAGES_LABEL: &[u8] = b"EXPORTER-xferry-pages";

/// A connection to another agent.
pub enum ControlStream<S> {
    /// Anybody may read and write it (`insecure = true`).
    Plain(S),
    /// TLS 1.3, both ends proved by certificates.
    Tls {
        /// The encrypted stream.
        stream: Box<TlsStream<S>>,
        /// Who is at the other end.
        peer: Certified,
    },
}

impl<S> ControlStream<S> {
    /// Who is at the other end; `None` where nobody has proved it.
    pub const fn peer(&self) -> Option<&Certified> {
        match self {
            Self::Plain(_) => None,
            Self::Tls { peer, .. } => Some(peer),
        }
    }

    /// What both ends know and nobody else, another one for each connection: for the page stream. `None` where nothing is
    /// encrypted.
    ///
    /// # Errors
    /// When TLS has none to give.
    pub fn page_secret(&self) -> Result<Option<Secret>, ControlError> {
        let Self::Tls { stream, .. } = self else { return Ok(None) };
        let secret = [0; 32];
        let exported = match stream.as_ref() {
            TlsStream::Client(stream) => stream.get_ref().1.export_keying_material(secret, PAGES_LABEL, None),
            TlsStream::Server(stream) => stream.get_ref().1.export_keying_material(secret, PAGES_LABEL, None),
        };
        exported.map(|secret| Some(Secret::new(secret))).map_err(|error| ControlError::Tls(error.to_string()))
    }
}

impl<S> StreamChannel<ControlStream<S>> {
    /// As [`ControlStream::peer`].
    pub const fn peer(&self) -> Option<&Certified> {
        self.stream().peer()
    }

    /// As [`ControlStream::page_secret`].
    ///
    /// # Errors
    /// The same.
    pub fn page_secret(&self) -> Result<Option<Secret>, ControlError> {
        self.stream().page_secret()
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> AsyncRead for ControlStream<S> {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Plain(stream) => Pin::new(stream).poll_read(cx, buffer),
            Self::Tls { stream, .. } => Pin::new(stream).poll_read(cx, buffer),
        }
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> AsyncWrite for ControlStream<S> {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Self::Plain(stream) => Pin::new(stream).poll_write(cx, bytes),
            Self::Tls { stream, .. } => Pin::new(stream).poll_write(cx, bytes),
        }
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Plain(stream) => Pin::new(stream).poll_flush(cx),
            Self::Tls { stream, .. } => Pin::new(stream).poll_flush(cx),
        }
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Plain(stream) => Pin::new(stream).poll_shutdown(cx),
            Self::Tls { stream, .. } => Pin::new(stream).poll_shutdown(cx),
        }
    }
}
