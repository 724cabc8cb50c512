//! Sockets on the migration NIC, and what the kernel says of them.

use std::{
    net::{IpAddr, SocketAddr, UdpSocket},
    sync::Arc,
};

use migrate_common::wire::{LANE_OFFSET, SESSION_OFFSET};
use quinn_udp::UdpSocketState;
use rustix::net::sockopt;
use socket2::{Domain, Protocol, Socket, Type};

use super::UdpError;
use crate::datapath::FrameLayout;

/// Room for frames that wait in one receiving socket, bytes; the kernel accounts for twice as much (socket(7)).
const RECEIVE_BYTES: usize = 16 << 20;
/// Room for frames that wait in one sending socket, bytes: a socket that has as much on the way blocks.
const SEND_BYTES: usize = 2 << 20;
/// What the kernel accounts for a frame beyond its bytes, at most: `sk_buff` with its shared info, headroom, and a first
/// buffer that is allocated in one piece, rounded up (`alloc_skb_with_frags`, net/core/skbuff.c).
const SKB_OVERHEAD: usize = 8192;
/// Unit in which the kernel takes buffers for the rest of it, bytes.
const SKB_PAGE: usize = 4096;

/// Socket option: take IPv6 datagrams without a checksum (RFC 6935).
#[derive(Clone, Copy)]
struct NoCheck6Rx;

nix::setsockopt_impl!(
    NoCheck6Rx,
    libc::IPPROTO_UDP,
    libc::UDP_NO_CHECK6_RX,
    bool,
    nix::sys::socket::sockopt::SetBool
);

/// One UDP socket on the migration NIC.
#[derive(Debug)]
pub struct UdpEnd {
    pub(super) socket: UdpSocket,
    pub(super) state: UdpSocketState,
}

/// An address of this host, by way of one interface.
#[derive(Clone, Copy)]
struct Place<'a> {
    interface: &'a str,
    address: SocketAddr,
}

impl Place<'_> {
    fn failed(self, operation: &'static str) -> impl Fn(std::io::Error) -> UdpError {
        let (interface, address) = (self.interface.to_owned(), self.address);
        move |source| match source.kind() {
            std::io::ErrorKind::AddrInUse => UdpError::InUse { interface: interface.clone(), address },
            _ => UdpError::System { operation, interface: interface.clone(), address, source },
        }
    }

    /// A socket that hears nothing of other interfaces.
    fn socket(self) -> Result<Socket, UdpError> {
        let domain = if self.address.is_ipv6() { Domain::IPV6 } else { Domain::IPV4 };
        let socket =
            Socket::new(domain, Type::DGRAM, Some(Protocol::UDP)).map_err(self.failed("creation"))?;
        socket.bind_device(Some(self.interface.as_bytes())).map_err(self.failed("binding to the device"))?;
        // While IPv6 still looks for duplicates of it, an address cannot be bound to otherwise.
        if self.address.is_ipv6() {
            socket.set_freebind_v6(true).map_err(self.failed("configuration"))?;
        }
        Ok(socket)
    }

    fn end(self, socket: Socket) -> Result<UdpEnd, UdpError> {
        let socket = UdpSocket::from(socket);
        // Never fragments, and does not block.
        let state = UdpSocketState::new((&socket).into()).map_err(self.failed("configuration"))?;
        Ok(UdpEnd { socket, state })
    }
}

impl UdpEnd {
    /// A socket from which frames go to `to` by way of `interface`: from port `port` of address `from`, or from any
    /// when that is taken.
    ///
    /// # Errors
    /// [`UdpError`].
    pub(super) fn sender(interface: &str, from: IpAddr, port: u16, to: SocketAddr) -> Result<Self, UdpError> {
        let place = Place { interface, address: SocketAddr::new(from, port) };
        let socket = place.socket()?;
        match socket.bind(&place.address.into()) {
            Err(error) if error.kind() == std::io::ErrorKind::AddrInUse => {
                socket.bind(&SocketAddr::new(from, 0).into()).map_err(place.failed("binding"))?;
            }
            other => other.map_err(place.failed("binding"))?,
        }
        // Connected, so that nobody else's datagrams wait in it.
        socket.connect(&to.into()).map_err(|source| UdpError::Unreachable {
            interface: interface.to_owned(),
            address: to,
            source,
        })?;
        if sockopt::set_socket_send_buffer_size_force(&socket, SEND_BYTES).is_err() {
            // Without the right to, as much as anybody may have.
            socket.set_send_buffer_size(SEND_BYTES).map_err(place.failed("configuration"))?;
        }
        place.end(socket)
    }
}

/// Lets the kernel give each datagram to the socket of its group whose number is session and lane, less what `count` goes into
/// them. A program of classic BPF that is asked so sees a datagram from its payload on, and finds zeros behind its end
/// (`run_bpf_filter`, net/core/sock_reuseport.c).
fn spread_by_lane(socket: &Socket, count: u32) -> nix::Result<()> {
    let step = |code: u32, k: u32| libc::sock_filter { code: code as u16, jt: 0, jf: 0, k };
    let byte = libc::BPF_LD | libc::BPF_B | libc::BPF_ABS;
    // The lowest byte of each is enough.
    let mut program = [
        step(byte, SESSION_OFFSET as u32),
        step(libc::BPF_MISC | libc::BPF_TAX, 0),
        step(byte, LANE_OFFSET as u32),
        step(libc::BPF_ALU | libc::BPF_ADD | libc::BPF_X, 0),
        step(libc::BPF_ALU | libc::BPF_MOD | libc::BPF_K, count),
        step(libc::BPF_RET | libc::BPF_A, 0),
    ];
    let program = libc::sock_fprog { len: program.len() as u16, filter: program.as_mut_ptr() };
    nix::sys::socket::setsockopt(socket, nix::sys::socket::sockopt::AttachReusePortCbpf, &program)
}

/// The sockets on one address and port, among which the kernel spreads what comes by session and lane (`SO_REUSEPORT`), as a
/// NIC does among its queues.
#[derive(Debug)]
pub struct UdpGroup {
    ends: Vec<Arc<UdpEnd>>,
    /// What the kernel lets wait in each, bytes as it accounts for them.
    room: usize,
}

impl UdpGroup {
    /// `count` sockets. Nobody else has or gets the port as long as they live.
    ///
    /// # Errors
    /// [`UdpError`].
    pub fn open(interface: &str, address: SocketAddr, count: usize) -> Result<Self, UdpError> {
        let place = Place { interface, address };
        let mut ends: Vec<Arc<UdpEnd>> = Vec::with_capacity(count);
        let mut room = usize::MAX;
        let mut bound = address;
        for _ in 0..count.max(1) {
            let socket = place.socket()?;
            if !ends.is_empty() {
                socket.set_reuse_port(true).map_err(place.failed("sharing its port"))?;
            }
            socket.bind(&bound.into()).map_err(place.failed("binding"))?;
            // The first is bound alone, so that another agent's sockets are not joined by mistake.
            socket.set_reuse_port(true).map_err(place.failed("sharing its port"))?;
            if address.is_ipv6() {
                // AF_XDP senders leave the UDP checksum away, which IPv6 allows where it is asked for (RFC 6935).
                nix::sys::socket::setsockopt(&socket, NoCheck6Rx, &true)
                    .map_err(|errno| place.failed("configuration")(errno.into()))?;
            }
            if sockopt::set_socket_recv_buffer_size_force(&socket, RECEIVE_BYTES).is_err() {
                // Without the right to, as much as anybody may have.
                socket.set_recv_buffer_size(RECEIVE_BYTES).map_err(place.failed("configuration"))?;
            }
            if count > 1
                && ends.len() + 1 == count
                && let Err(error) = spread_by_lane(&socket, count as u32)
            {
                // By addresses and ports then: lanes may meet in one socket.
                tracing::debug!(%error, "the kernel does not spread lanes over sockets");
            }
            room = room.min(socket.recv_buffer_size().map_err(place.failed("configuration"))?);
            let end = place.end(socket)?;
            // Port 0 was chosen by the kernel.
            bound = end.socket.local_addr().map_err(place.failed("address"))?;
            ends.push(Arc::new(end));
        }
        Ok(Self { ends, room })
    }

    /// The sockets.
    pub fn ends(&self) -> &[Arc<UdpEnd>] {
        &self.ends
    }

    /// Full frames that may wait in one socket (`__udp_enqueue_schedule_skb`, net/ipv4/udp.c, drops by what buffers
    /// take, not by their bytes).
    pub fn frames(&self, frames: &FrameLayout) -> usize {
        self.room / (frames.frame_len.next_multiple_of(SKB_PAGE) + SKB_OVERHEAD)
    }

    /// Datagrams that the kernel dropped for lack of room, all sockets.
    pub fn drops(&self) -> u64 {
        let inodes: Vec<u64> = self
            .ends
            .iter()
            .filter_map(|end| rustix::fs::fstat(&end.socket).ok())
            .map(|stat| stat.st_ino)
            .collect();
        ["/proc/thread-self/net/udp", "/proc/thread-self/net/udp6"]
            .iter()
            .map(|table| drops(&std::fs::read_to_string(table).unwrap_or_default(), &inodes))
            .sum()
    }
}

/// Sum of the column `drops` over sockets with these inodes (`udp4_format_sock`, net/ipv4/udp.c: the tenth column is the
/// inode, the last one the drops).
fn drops(table: &str, inodes: &[u64]) -> u64 {
    let of_line = |line: &str| -> Option<u64> {
        let fields: Vec<&str> = line.split_whitespace().collect();
        let inode: u64 = fields.get(9)?.parse().ok()?;
        inodes.contains(&inode).then(|| fields.last()?.parse().ok())?
    };
    table.lines().skip(1).filter_map(of_line).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn drops_of_our_own_sockets_are_summed() {
        let table = "\
   sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode ref pointer drops
  100: 0100007F:12B7 00000000:0000 07 00000000:00000000 00:00000000 00000000     0        0 77 2 0000000000000000 5
  101: 0100007F:12B7 00000000:0000 07 00000000:00000000 00:00000000 00000000     0        0 78 2 0000000000000000 7
  102: 0100007F:12B8 00000000:0000 07 00000000:00000000 00:00000000 00000000     0        0 79 2 0000000000000000 9
";
        assert_eq!(drops(table, &[77, 78]), 12);
        assert_eq!(drops(table, &[5]), 0);
        assert_eq!(drops("", &[77]), 0);
    }
}
