//! TCP sockets that notice when the other side is gone.

use std::{net::SocketAddr, time::Duration};

use socket2::{Domain, Protocol, SockRef, Socket, TcpKeepalive, Type};
use tokio::net::{TcpListener, TcpStream};

use super::ControlError;

/// Silence after which the peer's kernel is asked whether it lives.
const KEEPALIVE: Duration = Duration::from_secs(2);
/// Time after which unacknowledged data breaks the connection (RFC 5482, `TCP_USER_TIMEOUT` of tcp(7)).
const USER_TIMEOUT: Duration = Duration::from_secs(10);
/// Time for the connection to be made.
const CONNECT_LIMIT: Duration = Duration::from_secs(5);
const BACKLOG: i32 = 64;

/// Sets what every control connection needs: no delay for small messages, keep-alive, a limit on silence.
///
/// # Errors
/// What the kernel says.
pub fn tune(stream: &TcpStream) -> std::io::Result<()> {
    stream.set_nodelay(true)?;
    let socket = SockRef::from(stream);
    socket.set_tcp_keepalive(
        &TcpKeepalive::new().with_time(KEEPALIVE).with_interval(KEEPALIVE).with_retries(3),
    )?;
    socket.set_tcp_user_timeout(Some(USER_TIMEOUT))?;
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

/// Connects to the agent at `address`, from `local` where given.
///
/// # Errors
/// [`ControlError::Connect`].
pub async fn connect(
    address: SocketAddr,
    local: Option<std::net::IpAddr>,
) -> Result<TcpStream, ControlError> {
    let failed = |source| ControlError::Connect { address, source };
    let socket =
        if address.is_ipv4() { tokio::net::TcpSocket::new_v4() } else { tokio::net::TcpSocket::new_v6() }
            .map_err(failed)?;
    if let Some(local) = local.filter(|local| !local.is_unspecified() && local.is_ipv4() == address.is_ipv4())
    {
        socket.bind(SocketAddr::new(local, 0)).map_err(failed)?;
    }
    let stream = tokio::time::timeout(CONNECT_LIMIT, socket.connect(address))
        .await
        .map_err(|_| failed(std::io::ErrorKind::TimedOut.into()))?
        .map_err(failed)?;
    tune(&stream).map_err(failed)?;
    Ok(stream)
}
