//! TCP sockets that notice when the other side is gone.

use std::{
    io::ErrorKind,
    net::SocketAddr,
    time::{Duration, Instant},
};

use socket2::{Domain, Protocol, SockRef, Socket, TcpKeepalive, Type};
use tokio::net::{TcpListener, TcpSocket, TcpStream};

use super::ControlError;

/// Probes of a silent peer's kernel within the time that it has.
const KEEPALIVE_PROBES: u32 = 4;
/// Pause between two attempts to find a neighbour.
const LOOK_AGAIN: Duration = Duration::from_millis(200);
const BACKLOG: i32 = 64;

/// Sets what every control connection needs: no delay for small messages, keep-alive, and that it breaks when the
/// peer's kernel is silent for `dead_peer` (RFC 5482, `TCP_USER_TIMEOUT` of tcp(7)).
///
/// # Errors
/// What the kernel says.
pub fn tune(stream: &TcpStream, dead_peer: Duration) -> std::io::Result<()> {
    stream.set_nodelay(true)?;
    let socket = SockRef::from(stream);
    // The kernel counts in seconds here.
    let interval = (dead_peer / KEEPALIVE_PROBES).max(Duration::from_secs(1));
    socket.set_tcp_keepalive(
        &TcpKeepalive::new().with_time(interval).with_interval(interval).with_retries(KEEPALIVE_PROBES - 1),
    )?;
    socket.set_tcp_user_timeout(Some(dead_peer))?;
    Ok(())
}

/// Listens on `address`.
///
/// # Errors
/// [`ControlError::Listen`].
pub fn listen(address: SocketAddr) -> Result<TcpListener, ControlError> {
    let bound = (|| {
        let socket = Socket::new(Domain::for_address(address), Type::STREAM, Some(Protocol::TCP))?;
        socket.set_reuse_address(true)?;
        socket.set_nonblocking(true)?;
        socket.bind(&address.into())?;
        socket.listen(BACKLOG)?;
        TcpListener::from_std(socket.into())
    })();
    bound.map_err(|source| ControlError::Listen { address, source })
}

/// Connects to the agent at `address` within `limit`, from `local` where given; `dead_peer` as for [`tune`].
///
/// # Errors
/// [`ControlError::Connect`].
pub async fn connect(
    address: SocketAddr,
    local: Option<std::net::IpAddr>,
    limit: Duration,
    dead_peer: Duration,
) -> Result<TcpStream, ControlError> {
    let failed = |source| ControlError::Connect { address, source };
    let attempt = async || {
        let socket = if address.is_ipv4() { TcpSocket::new_v4() } else { TcpSocket::new_v6() }?;
        if let Some(local) =
            local.filter(|local| !local.is_unspecified() && local.is_ipv4() == address.is_ipv4())
        {
            socket.bind(SocketAddr::new(local, 0))?;
        }
        socket.connect(address).await
    };
    let connecting = async {
        let begun = Instant::now();
        loop {
            match attempt().await {
                // A link that was down, or a neighbour that was, is not found again at once.
                Err(error) if error.kind() == ErrorKind::HostUnreachable && begun.elapsed() < limit => {
                    tokio::time::sleep(LOOK_AGAIN).await;
                }
                other => return other,
            }
        }
    };
    let stream = tokio::time::timeout(limit + LOOK_AGAIN, connecting)
        .await
        .map_err(|_| failed(ErrorKind::TimedOut.into()))?
        .map_err(failed)?;
    tune(&stream, dead_peer).map_err(failed)?;
    Ok(stream)
}
