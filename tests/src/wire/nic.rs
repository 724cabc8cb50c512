//! A NIC's frames, whole and as they are, by a packet socket.

use std::io::{self, ErrorKind, IoSlice, Read};
use std::os::fd::{AsFd, IntoRawFd};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use pnet_datalink::{Channel, ChannelType, Config};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{MMsgHdr, SendAncillaryBuffer, SendFlags, sendmmsg, sockopt};
use socket2::{Domain, Protocol, Socket, Type};

use super::line::Frame;
use crate::lab::netns;

/// Room for frames that wait in the socket, bytes: more than any window of any number of lanes.
const SOCKET_BYTES: usize = 64 << 20;
/// How long to wait until the NIC takes frames again.
const RETRY: Duration = Duration::from_micros(50);
/// Frames given to the kernel at once.
pub(super) const BATCH: usize = 64;

/// A NIC that is read and written frame by frame.
pub struct PacketNic {
    socket: Socket,
}

impl PacketNic {
    /// Opens NIC `name` of a namespace.
    ///
    /// # Errors
    /// If there is none, or without the right to.
    pub fn open(namespace: &str, name: &str) -> Result<Self> {
        Self::bound(namespace, name, ChannelType::Layer2)
    }

    /// The same for sending alone: the kernel does not so much as look whether a frame that comes or goes is for it.
    ///
    /// # Errors
    /// As [`Self::open`].
    pub fn deaf(namespace: &str, name: &str) -> Result<Self> {
        // Bound to protocol 0, which is none (packet(7)). The socket is ours and stays one for whole frames.
        Self::bound(namespace, name, ChannelType::Layer3(0))
    }

    fn bound(namespace: &str, name: &str, channel_type: ChannelType) -> Result<Self> {
        let opened = netns::inside(namespace, || {
            let nic = pnet_datalink::interfaces().into_iter().find(|nic| nic.name == name);
            let nic = nic.with_context(|| format!("no NIC {name}"))?;
            // Protocol 0 hears nothing until it is bound, so that nothing of other NICs gets in.
            let socket = Socket::new(Domain::PACKET, Type::RAW, Some(Protocol::from(0)))?;
            sockopt::set_socket_recv_buffer_size_force(&socket, SOCKET_BYTES)?;
            // The kernel cuts it to what anybody may have, which a few frames fill.
            socket.set_send_buffer_size(SOCKET_BYTES)?;
            // pnet binds a socket of ours to a NIC, which has no safe way of its own, and closes this copy.
            let copy = Some(socket.try_clone()?.into_raw_fd());
            let config = Config { socket_fd: copy, channel_type, ..Config::default() };
            let Channel::Ethernet(..) = pnet_datalink::channel(&nic, config)? else {
                bail!("{name} is not an Ethernet NIC");
            };
            socket.set_nonblocking(true)?;
            Ok(Self { socket })
        });
        opened.with_context(|| format!("opening {name} in namespace {namespace}"))
    }

    /// The next frame's length, if one is there.
    ///
    /// # Errors
    /// When the NIC is down or gone.
    pub fn receive(&self, buffer: &mut [u8]) -> io::Result<Option<usize>> {
        match (&self.socket).read(buffer) {
            Ok(len) => Ok(Some(len)),
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Waits until a frame is there, at most `limit`.
    pub fn wait(&self, limit: Duration) {
        let timeout = Timespec { tv_sec: limit.as_secs() as i64, tv_nsec: i64::from(limit.subsec_nanos()) };
        // Woken early is as good: the caller looks again.
        let _ = poll(&mut [PollFd::new(&self.socket, PollFlags::IN)], Some(&timeout));
    }

    /// Sends frames in order; returns how many the NIC did not take.
    pub fn send(&self, frames: &[Frame]) -> u64 {
        let mut refused = 0;
        for batch in frames.chunks(BATCH) {
            refused += self.send_batch(batch);
        }
        refused
    }

    fn send_batch(&self, frames: &[Frame]) -> u64 {
        let mut refused = 0;
        let mut rest = frames;
        while !rest.is_empty() {
            let slices: Vec<[IoSlice<'_>; 1]> =
                rest.iter().map(|frame| [IoSlice::new(frame.bytes())]).collect();
            let mut control: Vec<SendAncillaryBuffer<'_, '_, '_>> =
                rest.iter().map(|_| SendAncillaryBuffer::default()).collect();
            let mut messages: Vec<MMsgHdr<'_>> = slices
                .iter()
                .zip(&mut control)
                .map(|(slice, control)| MMsgHdr::new(slice, control))
                .collect();
            match sendmmsg(self.socket.as_fd(), &mut messages, SendFlags::DONTWAIT) {
                Ok(sent) => rest = &rest[sent..],
                Err(Errno::AGAIN | Errno::INTR) => std::thread::sleep(RETRY),
                // A full queue behind it, or a NIC that is down: this frame is lost, as on any wire.
                Err(_) => {
                    refused += 1;
                    rest = &rest[1..];
                }
            }
        }
        refused
    }
}
