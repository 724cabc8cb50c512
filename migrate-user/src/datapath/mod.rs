//! The page stream: pages become frames, frames become pages, and what got lost is found out.
//!
//! A **round** sends a set of pages under one **epoch**; within an epoch every page is sent at most once. Each
//! sender thread (**lane**) numbers its frames from 0. When a round is over, the receiver *closes* the epoch:
//! each receive worker stops taking frames of it, then the union of what they got is compared with what was
//! sent. Pages of missing frames are simply dirty again: there is no retransmit queue, and since no frame of
//! a closed epoch is ever placed, a late or reordered one cannot overwrite newer content.
//!
//! Frames are [guarded](Protection) by a checksum or, where the agents have a secret, encrypted.
//!
//! Threads, not tasks, move pages; frames go to a [`FrameSink`] and come from a [`FrameSource`]: AF_XDP, UDP sockets, or memory
//! in the tests.

mod accounting;
mod arrivals;
mod behind;
mod datagram;
mod demux;
mod direct;
mod feedback;
mod frame;
mod layout;
mod pacing;
mod packing;
mod path;
mod protection;
pub(crate) mod reach;
mod receiver;
mod sender;
mod sink;
mod source;
#[cfg(test)]
mod stream_tests;
mod udp;
mod unchanged;
mod window;

pub use accounting::{FrameSet, LaneLosses, QueueFigures, losses};
pub use arrivals::InboundCounters;
pub use datagram::{Datagram, Pieces};
pub use demux::Demux;
pub use direct::{DirectSink, LaidOut, Stretch};
pub use feedback::{FEEDBACK_LEN, Feedback, FeedbackRx, FeedbackSocket, FeedbackTx};
pub use frame::Frame;
pub use layout::{FrameLayout, LayoutError};
pub use pacing::{Bandwidth, Pacer};
pub use packing::{
    Codec, Compression, Method, NotUnpacked, Packer, Packings, Unpacker, agree as agree_packing,
};
pub use path::{Endpoint, FramePath};
pub use protection::{
    Cipher, Disagreement, Encryption, FeedbackKey, KeyError, NonceReused, Offer, Opener, PageKey, Protection,
    Sealer, Secret, Unproved, agree,
};
pub use receiver::{Inbound, InboundSpec, SessionReceiver};
pub use sender::{LaneConfig, LaneRound, LaneSender, Packed, Pages, SendError};
pub use sink::{FrameSink, XskSink};
pub use source::{FrameSource, XskSource};
pub use udp::{Gate, GateFull, UdpEnd, UdpError, UdpGroup, UdpSink, UdpSource};
pub use unchanged::{Changed, SentHashes};
pub use window::Window;
