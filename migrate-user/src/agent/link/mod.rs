//! What lies below the [port](super::port): AF_XDP behind an XDP program, or UDP sockets where that cannot be had. The frames
//! are the same, so either may be at the other end.

mod choice;
mod direct;
mod udp;
mod xdp;

use std::{
    net::{IpAddr, SocketAddr},
    os::fd::BorrowedFd,
};

pub(super) use choice::open_port;
pub(super) use direct::NotDirect;
pub(super) use udp::UdpLink;
pub(super) use xdp::{XdpLink, log_xdp};

use crate::{
    datapath::{DirectSink, FrameLayout, FramePath, FrameSink, LaidOut, UdpSink},
    migration::MigrationError,
    network::{AttachMode, DropCount, Nic, Transport},
    xsk::Binding,
};
use xdp::LeasedSink;

/// First source port of the page stream; each lane has its own, so that the receiver's NIC spreads them.
const FIRST_SOURCE_PORT: u16 = 49_152;

/// What lies below the port.
pub(super) enum Link {
    /// AF_XDP.
    Xdp(Box<XdpLink>),
    /// UDP sockets.
    Udp(UdpLink),
}

impl Link {
    /// Which of the two.
    pub fn transport(&self) -> Transport {
        match self {
            Self::Xdp(_) => Transport::AfXdp,
            Self::Udp(_) => Transport::Udp,
        }
    }

    /// How the XDP program is attached, where there is one.
    pub fn attach_mode(&self) -> Option<AttachMode> {
        match self {
            Self::Xdp(link) => Some(link.attach_mode()),
            Self::Udp(_) => None,
        }
    }

    /// What the kernel agreed to.
    pub fn binding(&self) -> Binding {
        match self {
            Self::Xdp(link) => link.binding(),
            // The kernel copies, and takes any datagram.
            Self::Udp(_) => Binding { multi_buffer: true, zero_copy: false },
        }
    }

    /// How many lanes a migration from here has, and how many workers receive.
    pub fn lanes(&self) -> usize {
        match self {
            Self::Xdp(link) => link.lanes(),
            Self::Udp(link) => link.lanes(),
        }
    }

    /// Full frames that one queue holds.
    pub fn room(&self, frames: &FrameLayout) -> usize {
        match self {
            Self::Xdp(link) => link.room(frames),
            Self::Udp(link) => link.room(frames),
        }
    }

    /// Whether it still works on a NIC whose facts are these.
    ///
    /// # Errors
    /// What has changed.
    pub fn still_on(&self, nic: &Nic) -> Result<(), MigrationError> {
        match self {
            Self::Xdp(_) => Ok(()),
            Self::Udp(link) => link.still_on(nic),
        }
    }

    /// Lets frames of migration `session` from `peer` in.
    ///
    /// # Errors
    /// When there are too many.
    pub fn admit(&self, session: u64, peer: IpAddr) -> Result<(), MigrationError> {
        match self {
            Self::Xdp(link) => link.admit(session, peer),
            Self::Udp(link) => link.admit(session, peer),
        }
    }

    /// Shuts migration `session` out again. Harmless when it is not in.
    pub fn dismiss(&self, session: u64) {
        match self {
            Self::Xdp(link) => link.dismiss(session),
            Self::Udp(link) => link.dismiss(session),
        }
    }

    /// Frames to the data port that were dropped, by reason.
    pub fn drops(&self) -> Vec<DropCount> {
        match self {
            Self::Xdp(link) => link.drops(),
            Self::Udp(link) => link.drops(),
        }
    }

    /// Frames that the kernel dropped for lack of buffers.
    pub fn no_buffer(&self) -> u64 {
        match self {
            Self::Xdp(link) => link.no_buffer(),
            Self::Udp(link) => link.no_buffer(),
        }
    }

    /// What the lanes of one migration leave by.
    ///
    /// # Errors
    /// When another migration has it.
    pub fn outlets(&self, nic: &Nic) -> Result<Vec<Outlet>, MigrationError> {
        match self {
            Self::Xdp(link) => {
                Ok(link.lease(nic)?.into_iter().map(|sink| Outlet::Xdp(Box::new(sink))).collect())
            }
            Self::Udp(link) => Ok((0..link.lanes()).map(|_| Outlet::Udp).collect()),
        }
    }

    /// A queue of its own for a migration, that sends `pages` of a guest from where they lie in `files`.
    ///
    /// # Errors
    /// [`NotDirect`].
    pub fn direct(
        &self,
        nic: &Nic,
        frames: &FrameLayout,
        pages: LaidOut,
        files: &[BorrowedFd<'_>],
    ) -> Result<Outlet, NotDirect> {
        match self {
            Self::Xdp(link) => {
                let sink = direct::open(nic, link.lanes() as u32, link.binding(), frames, pages, files)?;
                Ok(Outlet::Direct(Box::new(sink)))
            }
            Self::Udp(_) => Err(NotDirect::Udp),
        }
    }
}

/// Where frames are to go.
#[derive(Clone, Copy, Debug)]
pub(super) struct Target {
    /// Address of the other migration NIC.
    pub ip: IpAddr,
    /// Its Ethernet address.
    pub mac: [u8; 6],
    /// UDP port of the page stream there.
    pub port: u16,
}

/// What one lane leaves by, before it is known whereto.
pub(super) enum Outlet {
    /// A send queue.
    Xdp(Box<LeasedSink>),
    /// A send queue with the guest's RAM in its UMEM.
    Direct(Box<DirectSink>),
    /// A socket to be made.
    Udp,
}

impl Outlet {
    /// The sink of lane `lane` towards `to`, and the headers of its frames.
    ///
    /// # Errors
    /// When there is no way to there.
    pub fn towards(self, nic: &Nic, lane: u16, to: Target) -> Result<(LaneSink, FramePath), MigrationError> {
        let source_port = FIRST_SOURCE_PORT + lane;
        match self {
            Self::Xdp(sink) => Ok((LaneSink::Xdp(*sink), xdp::path(nic, source_port, to)?)),
            Self::Direct(sink) => Ok((LaneSink::Direct(sink), xdp::path(nic, source_port, to)?)),
            Self::Udp => {
                let address = SocketAddr::new(to.ip, to.port);
                let sink = UdpSink::open(&nic.name, nic.address(), source_port, address)?;
                Ok((LaneSink::Udp(sink), FramePath::bare(to.ip)))
            }
        }
    }
}

/// Where one lane's frames go.
pub(super) enum LaneSink {
    /// A send queue, on loan.
    Xdp(LeasedSink),
    /// A send queue of its own.
    Direct(Box<DirectSink>),
    /// A socket.
    Udp(UdpSink),
}

impl FrameSink for LaneSink {
    fn frame(&mut self, fill: impl FnOnce(&mut [u8]) -> usize) -> std::io::Result<bool> {
        match self {
            Self::Xdp(sink) => sink.frame(fill),
            Self::Direct(sink) => sink.frame(fill),
            Self::Udp(sink) => sink.frame(fill),
        }
    }

    fn flush(&mut self) -> std::io::Result<usize> {
        match self {
            Self::Xdp(sink) => sink.flush(),
            Self::Direct(sink) => sink.flush(),
            Self::Udp(sink) => sink.flush(),
        }
    }

    fn direct(&mut self) -> Option<&mut DirectSink> {
        match self {
            Self::Direct(sink) => sink.direct(),
            Self::Xdp(_) | Self::Udp(_) => None,
        }
    }
}
