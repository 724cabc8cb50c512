//! From the datagrams of one queue to the migrations they belong to.

use std::sync::{
    Arc,
    atomic::{AtomicU64, Ordering},
};

use super::{accounting::FrameSet, datagram::Datagram, receiver::Inbound, receiver::SessionReceiver};

/// The migrations that one receive worker takes frames of.
#[derive(Default)]
pub struct Demux {
    sessions: Vec<SessionReceiver>,
    damaged: Arc<AtomicU64>,
}

impl Demux {
    /// Frames that were not whole, had changed on the way or were forged; grows as they come.
    pub fn damaged(&self) -> Arc<AtomicU64> {
        Arc::clone(&self.damaged)
    }

    /// Takes frames of a migration, as NIC queue `queue`.
    pub fn open(&mut self, inbound: Arc<Inbound>, queue: u32) {
        self.sessions.push(SessionReceiver::new(inbound, queue));
    }

    /// Ends an epoch of a migration: the frames that arrived, by lane. After this no frame of it is placed here.
    pub fn close(&mut self, session: u64, epoch: u32) -> Vec<FrameSet> {
        self.find(session).map(|receiver| receiver.close(epoch)).unwrap_or_default()
    }

    /// Forgets a migration. After this nothing of it is touched here.
    pub fn forget(&mut self, session: u64) {
        self.sessions.retain(|receiver| receiver.inbound().session() != session);
    }

    /// Gives a datagram to the migration it belongs to, or counts why not; `None` is one that could not be read.
    pub fn take(&mut self, datagram: Option<&Datagram<'_>>) {
        let taken = datagram.is_some_and(|datagram| match datagram.header() {
            // Between two migrations there may be a frame of the last one.
            Ok(header) => {
                self.find(header.session).is_none_or(|receiver| receiver.handle(datagram, header).is_ok())
            }
            Err(_) => {
                let session = datagram.claimed_session();
                if let Some(receiver) = session.and_then(|session| self.find(session)) {
                    receiver.corrupt();
                }
                false
            }
        });
        if !taken {
            self.damaged.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Whether no migration is being received.
    pub fn is_empty(&self) -> bool {
        self.sessions.is_empty()
    }

    /// Tells all senders how far they got. `idle` says that nothing more is waiting here.
    pub fn feedback(&mut self, idle: bool) {
        self.sessions.iter_mut().for_each(|receiver| receiver.feedback(idle));
    }

    /// Says the last feedback once more, in case it was lost.
    pub fn repeat_feedback(&mut self) {
        for receiver in &mut self.sessions {
            receiver.repeat_feedback();
        }
    }

    /// Whether there is feedback that may have been lost.
    pub fn may_repeat(&self) -> bool {
        self.sessions.iter().any(SessionReceiver::may_repeat)
    }

    fn find(&mut self, session: u64) -> Option<&mut SessionReceiver> {
        self.sessions.iter_mut().find(|receiver| receiver.inbound().session() == session)
    }
}
