//! The page stream: pages become frames, frames become pages, and what got lost is found out.
//!
//! A **round** sends a set of pages under one **epoch**; within an epoch every page is sent at most once. Each
//! sender thread (**lane**) numbers its frames from 0. When a round is over, the receiver *closes* the epoch:
//! each receive worker stops taking frames of it, then the union of what they got is compared with what was
//! sent. Pages of missing frames are simply dirty again: there is no retransmit queue, and since no frame of
//! a closed epoch is ever placed, a late or reordered one cannot overwrite newer content.
//!
//! Threads, not tasks, move pages; this module knows AF_XDP only through [`FrameSink`] and
//! [`crate::xsk::Packet`], so that all of it runs in memory in the tests.

mod accounting;
mod feedback;
mod frame;
mod layout;
mod pacing;
mod receiver;
mod sender;
mod sink;
#[cfg(test)]
mod stream_tests;
mod window;

pub use accounting::{FrameSet, LaneLosses, QueueFigures, losses};
pub use feedback::{FEEDBACK_LEN, Feedback, FeedbackRx, FeedbackTx};
pub use frame::{Endpoint, FrameError, FramePath, checked_frame, claimed_session, write_frame};
pub use layout::{FrameLayout, LayoutError};
pub use pacing::Pacer;
pub use receiver::{Inbound, InboundCounters, InboundSpec, SessionReceiver};
pub use sender::{LaneConfig, LaneRound, LaneSender, Pages, SendError};
pub use sink::{FrameSink, XskSink};
pub use window::Window;
