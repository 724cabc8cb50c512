//! The migration NIC as the agent owns it: a link, receive workers, the migrations that are received.

use std::{
    os::fd::BorrowedFd,
    sync::{Arc, Mutex, Weak},
};

use serde::Serialize;
use tokio::sync::oneshot;

use super::{
    AgentError,
    config::MigrationConfig,
    link::{Link, NotDirect, Outlet, UdpLink, XdpLink, log_xdp},
    placement::{Placed, Placement},
    worker::{Command, Worker},
};
use crate::{
    datapath::{FrameLayout, FrameSet, FrameSource, Inbound, LaidOut, QueueFigures, reach::with_reach},
    migration::MigrationError,
    network::{AttachMode, DropCount, Nic, Transport},
    preflight::NicFacts,
    sync::lock,
    xsk::Binding,
};

/// Most frames that may be on the way by one queue. A veth queue holds 256 (`VETH_RING_SIZE`, drivers/net/veth.c); real
/// NICs more, but a window beyond bandwidth × delay only fills queues.
const MAX_WINDOW: u32 = 240;

/// Why it is UDP sockets where the configuration leaves it open.
#[derive(Clone, Debug)]
pub(super) enum WhyUdp {
    /// They are faster here.
    Faster(&'static str),
    /// AF_XDP cannot be had.
    Denied(String),
}

/// The NIC, in use.
pub struct Port {
    nic: Nic,
    data_port: u16,
    link: Link,
    why_udp: Option<WhyUdp>,
    workers: Vec<Worker>,
    placement: Placement,
    /// Those that are being received, and some that were.
    inbounds: Mutex<Vec<Weak<Inbound>>>,
}

/// A migration that is being received, for status.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct SessionStatus {
    /// Its number.
    pub session: u64,
    /// What came to each queue so far.
    pub queues: Vec<QueueFigures>,
}

/// State of the NIC, for status.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct PortStatus {
    /// Interface.
    pub interface: String,
    /// Address.
    pub address: String,
    /// MTU, bytes.
    pub mtu: usize,
    /// AF_XDP or UDP sockets.
    pub transport: Transport,
    /// Why it is not AF_XDP though that would be faster.
    pub fallback: Option<String>,
    /// Why UDP sockets were chosen.
    pub choice: Option<&'static str>,
    /// Driver or generic; nothing where there is no XDP program.
    pub xdp_mode: Option<AttachMode>,
    /// Whether the driver works on the UMEM itself.
    pub zero_copy: bool,
    /// Whether frames may span several buffers.
    pub multi_buffer: bool,
    /// Sockets that receive.
    pub queues: usize,
    /// Processors of the threads that move pages, and why these; nothing where they run on any.
    pub cpus: Option<String>,
    /// Frames to the data port that the XDP program dropped, or what stands in for it.
    pub drops: Vec<DropCount>,
    /// Frames that reached userspace and were not whole.
    pub corrupt: u64,
    /// The same by queue.
    pub corrupt_by_queue: Vec<u64>,
    /// Migrations that are being received.
    pub sessions: Vec<SessionStatus>,
    /// Frames the kernel dropped for lack of buffers, all queues.
    pub no_buffer: u64,
}

impl Port {
    /// Takes the NIC by `transport` and starts the workers. `why_udp` is why it is UDP sockets, if nobody said so.
    ///
    /// # Errors
    /// What is in the way, with a remedy.
    pub(super) fn open(
        config: &MigrationConfig,
        transport: Transport,
        why_udp: Option<WhyUdp>,
    ) -> Result<Self, AgentError> {
        let nic = Nic::read(&config.interface).map_err(MigrationError::from)?;
        let placement = Placement::new(config.cpus.as_ref(), &nic.name)?;
        // Workers are started here, and buffers taken.
        let placed = placement.enter();
        let (link, workers) = match transport {
            Transport::AfXdp => {
                let (link, sources) = XdpLink::open(&nic, config)?;
                (Link::Xdp(Box::new(link)), start(sources, &nic)?)
            }
            Transport::Udp => {
                let (link, sources) = UdpLink::open(&nic, config)?;
                (Link::Udp(link), start(sources, &nic)?)
            }
        };
        drop(placed);
        let inbounds = Mutex::default();
        Ok(Self { data_port: config.port, link, why_udp, workers, placement, inbounds, nic })
    }

    /// Moves the calling thread to where pages are moved, until the returned value is dropped.
    pub(super) fn place(&self) -> Placed {
        self.placement.enter()
    }

    /// Where that is.
    pub(super) fn placement(&self) -> &Placement {
        &self.placement
    }

    /// Passes on what the XDP program logs, where there is one, for as long as the agent runs.
    pub(super) fn log(&self) {
        if let Link::Xdp(link) = &self.link {
            log_xdp(link);
        }
    }

    /// The NIC with its facts of now.
    ///
    /// # Errors
    /// When it lost its carrier, its address, or itself; or its MTU was changed, for which buffers were sized.
    pub(super) fn nic(&self) -> Result<Nic, MigrationError> {
        let nic = Nic::read(&self.nic.name)?;
        if nic.index != self.nic.index {
            return Err(MigrationError::Host(format!(
                "{} was replaced since the agent started: restart the agent",
                nic.name
            )));
        }
        if nic.mtu > self.nic.mtu {
            return Err(MigrationError::Host(format!(
                "the MTU of {} was raised from {} to {} since the agent started: restart the agent",
                nic.name, self.nic.mtu, nic.mtu
            )));
        }
        self.link.still_on(&nic)?;
        Ok(nic)
    }

    /// The NIC as it was when the agent started.
    pub(super) fn nic_at_start(&self) -> &Nic {
        &self.nic
    }

    /// What the other host is told about it.
    pub(super) fn facts(&self, mtu: usize) -> NicFacts {
        NicFacts {
            name: self.nic.name.clone(),
            mtu,
            transport: self.link.transport(),
            fallback: self.denied(),
            xdp_mode: self.xdp_mode().into(),
            zero_copy: self.binding().zero_copy,
            multi_buffer: self.binding().multi_buffer,
            queues: self.lanes(),
        }
    }

    /// Why AF_XDP cannot be had, where that is so.
    fn denied(&self) -> Option<String> {
        match &self.why_udp {
            Some(WhyUdp::Denied(reason)) => Some(reason.clone()),
            _ => None,
        }
    }

    fn xdp_mode(&self) -> &'static str {
        match self.link.attach_mode() {
            Some(AttachMode::Driver) => "driver",
            Some(AttachMode::Generic) => "generic",
            None => "none",
        }
    }

    /// UDP port of the page stream.
    pub(super) fn data_port(&self) -> u16 {
        self.data_port
    }

    /// What the kernel agreed to.
    pub(super) fn binding(&self) -> Binding {
        self.link.binding()
    }

    /// One line about how frames are received here.
    pub(super) fn describe(&self) -> String {
        let (name, queues) = (&self.nic.name, self.workers.len());
        let cpus = self.placement.describe().map(|cpus| format!(", processors {cpus}")).unwrap_or_default();
        match self.link.transport() {
            // Why, the preflight says.
            Transport::Udp => format!("UDP sockets on {name}, {queues} queue(s){cpus}"),
            Transport::AfXdp => format!(
                "AF_XDP on {name}, XDP {}, {}, {queues} queue(s){cpus}",
                self.xdp_mode(),
                if self.binding().zero_copy { "zero-copy" } else { "copy mode" },
            ),
        }
    }

    /// Frames that each of `lanes` may have on the way to here.
    pub(super) fn window(&self, frames: &FrameLayout, lanes: usize) -> u32 {
        window(self.link.room(frames), self.nic.queues as usize, lanes)
    }

    /// Lets a migration's frames in.
    ///
    /// # Errors
    /// When there are too many.
    pub(super) fn open_session(
        &self,
        inbound: &Arc<Inbound>,
        peer: std::net::IpAddr,
    ) -> Result<(), MigrationError> {
        for worker in &self.workers {
            worker.tell(Command::Open(Arc::clone(inbound)));
        }
        lock(&self.inbounds).push(Arc::downgrade(inbound));
        self.link.admit(inbound.session(), peer)
    }

    /// Closes an epoch on every worker: the frames that came, by lane.
    pub(super) async fn close_epoch(&self, session: u64, epoch: u32) -> Vec<FrameSet> {
        let mut answers = Vec::new();
        for worker in &self.workers {
            let (reply, answer) = oneshot::channel();
            worker.tell(Command::Close(session, epoch, reply));
            answers.push(answer);
        }
        let mut all: Vec<FrameSet> = Vec::new();
        for answer in answers {
            for (lane, received) in answer.await.unwrap_or_default().into_iter().enumerate() {
                if lane >= all.len() {
                    all.resize_with(lane + 1, FrameSet::default);
                }
                all[lane].union_with(&received);
            }
        }
        all
    }

    /// Shuts a migration out; when this returns, none of its pages is touched any more.
    pub(super) async fn close_session(&self, session: u64) {
        self.link.dismiss(session);
        for worker in &self.workers {
            let (reply, answer) = oneshot::channel();
            worker.tell(Command::Forget(session, reply));
            // No answer: the worker has ended and touches nothing.
            let _ = answer.await;
        }
    }

    /// What the lanes of one migration leave by.
    ///
    /// # Errors
    /// When another migration has it.
    pub(super) fn outlets(&self) -> Result<Vec<Outlet>, MigrationError> {
        self.link.outlets(&self.nic)
    }

    /// A queue of its own for a migration, that sends `pages` of a guest from where they lie in `files`.
    ///
    /// # Errors
    /// [`NotDirect`].
    pub(super) fn direct(
        &self,
        frames: &FrameLayout,
        pages: LaidOut,
        files: &[BorrowedFd<'_>],
    ) -> Result<Outlet, NotDirect> {
        let _placed = self.place();
        self.link.direct(&self.nic, frames, pages, files)
    }

    /// How many lanes a migration from here has.
    pub(super) fn lanes(&self) -> usize {
        self.link.lanes()
    }

    fn sessions(&self) -> Vec<SessionStatus> {
        let mut inbounds = lock(&self.inbounds);
        inbounds.retain(|inbound| inbound.strong_count() > 0);
        let live = inbounds.iter().filter_map(Weak::upgrade);
        live.map(|inbound| SessionStatus { session: inbound.session(), queues: inbound.figures() }).collect()
    }

    /// State for the operator.
    pub fn status(&self) -> PortStatus {
        PortStatus {
            interface: self.nic.name.clone(),
            address: self.nic.address().to_string(),
            mtu: self.nic.mtu,
            transport: self.link.transport(),
            fallback: self.denied(),
            choice: match self.why_udp {
                Some(WhyUdp::Faster(reason)) => Some(reason),
                _ => None,
            },
            xdp_mode: self.link.attach_mode(),
            zero_copy: self.binding().zero_copy,
            multi_buffer: self.binding().multi_buffer,
            queues: self.lanes(),
            cpus: self.placement.describe(),
            drops: self.link.drops(),
            corrupt: self.workers.iter().map(Worker::damaged).sum(),
            corrupt_by_queue: self.workers.iter().map(Worker::damaged).collect(),
            sessions: self.sessions(),
            no_buffer: self.link.no_buffer(),
        }
    }
}

/// A worker for each source.
fn start<S: FrameSource + 'static>(sources: Vec<S>, nic: &Nic) -> Result<Vec<Worker>, AgentError> {
    let worker = |(queue, source)| {
        Worker::start(queue, source).map_err(|error| {
            AgentError::Host(format!("no thread for queue {queue} of {}: {error}", nic.name))
        })
    };
    (0..).zip(sources).map(worker).collect()
}

/// Frames that each of `lanes` may have on the way to a NIC of so many queues, where one receiver has room for `room` of them.
fn window(room: usize, queues: usize, lanes: usize) -> u32 {
    let lanes = lanes.max(1);
    // All lanes may come to one receiver.
    let room = with_reach(room) / lanes;
    // More lanes than queues share what the path holds: they would overflow it together.
    let path = MAX_WINDOW as usize * queues.clamp(1, lanes) / lanes;
    room.min(path).max(1) as u32
}

#[cfg(test)]
mod tests {
    use super::{MAX_WINDOW, window};

    #[test]
    fn lanes_that_share_a_queue_share_its_window() {
        assert_eq!([1, 2, 4].map(|lanes| window(100_000, 1, lanes)), [MAX_WINDOW, 120, 60]);
        assert_eq!([1, 2, 4].map(|lanes| window(100_000, 4, lanes)), [MAX_WINDOW; 3]);
    }

    #[test]
    fn all_lanes_fit_one_receiver_and_none_stands_still() {
        assert_eq!(window(160, 2, 2), 46);
        assert_eq!((window(0, 0, 0), window(3, 1, 64)), (1, 1));
    }
}
