//! Who may send frames here, where no XDP program asks.

use std::{
    net::IpAddr,
    sync::{
        Arc, Mutex, MutexGuard,
        atomic::{AtomicU64, Ordering},
    },
};

use migrate_common::maps::{DROP_REASONS, DropReason, MAX_SESSIONS};

use crate::datapath::Datagram;
use crate::sync::lock;

/// More migrations than the gate has room for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{MAX_SESSIONS} migrations are arriving already: wait until one of them is done (`xferry status`)")]
pub struct GateFull;

/// The registered migrations, and what was dropped. Changed under a lock, read without one: every source has a copy that
/// it renews when the generation says so.
#[derive(Debug, Default)]
pub struct Gate {
    registered: Mutex<Registered>,
    generation: AtomicU64,
    drops: [AtomicU64; DROP_REASONS as usize],
}

/// Number and peer of each migration.
type Registered = Vec<(u64, IpAddr)>;

impl Gate {
    /// Lets frames of migration `session` from `peer` in.
    ///
    /// # Errors
    /// [`GateFull`].
    pub fn admit(&self, session: u64, peer: IpAddr) -> Result<(), GateFull> {
        let mut registered = self.registered();
        registered.retain(|&(other, _)| other != session);
        if registered.len() >= MAX_SESSIONS as usize {
            return Err(GateFull);
        }
        registered.push((session, peer.to_canonical()));
        self.generation.fetch_add(1, Ordering::Release);
        Ok(())
    }

    /// Shuts migration `session` out again. Harmless when it is not in.
    pub fn dismiss(&self, session: u64) {
        self.registered().retain(|&(other, _)| other != session);
        self.generation.fetch_add(1, Ordering::Release);
    }

    /// What was dropped, by reason.
    pub fn drops(&self) -> [(DropReason, u64); DROP_REASONS as usize] {
        DropReason::ALL.map(|reason| (reason, self.drops[reason as usize].load(Ordering::Relaxed)))
    }

    fn registered(&self) -> MutexGuard<'_, Registered> {
        lock(&self.registered)
    }
}

/// One source's copy of the gate.
#[derive(Debug)]
pub(super) struct Watch {
    gate: Arc<Gate>,
    generation: u64,
    registered: Registered,
}

impl Watch {
    pub fn new(gate: Arc<Gate>) -> Self {
        let mut watch = Self { generation: 0, registered: Registered::new(), gate };
        watch.renew();
        watch
    }

    /// Takes in what has changed. Once a batch is enough: a change is as good as made before its first frame or
    /// after its last.
    pub fn renew(&mut self) {
        let now = self.gate.generation.load(Ordering::Acquire);
        if now != self.generation {
            // A change between the two lines is copied now and once more with the next batch.
            self.registered.clone_from(&self.gate.registered());
            self.generation = now;
        }
    }

    /// Whether a datagram is a whole frame of a registered migration and comes from its peer; counts why not.
    pub fn lets_in(&self, datagram: &Datagram<'_>, from: IpAddr) -> bool {
        match self.judge(datagram, from) {
            Ok(()) => true,
            Err(reason) => {
                self.gate.drops[reason as usize].fetch_add(1, Ordering::Relaxed);
                false
            }
        }
    }

    fn judge(&self, datagram: &Datagram<'_>, from: IpAddr) -> Result<(), DropReason> {
        let header = datagram.header().map_err(DropReason::from)?;
        let registered = self.registered.iter().find(|&&(session, _)| session == header.session);
        let &(_, peer) = registered.ok_or(DropReason::UnknownSession)?;
        if peer == from.to_canonical() { Ok(()) } else { Err(DropReason::WrongPeer) }
    }
}
