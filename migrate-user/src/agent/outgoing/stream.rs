//! The page stream that leaves this host.

use std::sync::{
    Arc,
    atomic::{AtomicBool, AtomicU64, Ordering},
};

use crate::{
    agent::{link::LaneSink, placement::Placement},
    datapath::{
        Bandwidth, Changed, FeedbackSocket, FrameLayout, LaneLosses, LaneRound, LaneSender, Packed, Pages,
        SendError, SentHashes,
    },
    memory::{AtomicPageSet, Mapping, PageSet, RamLayout},
    migration::{MigrationError, PageStream, RoundSent},
};

pub(super) type Lane = LaneSender<LaneSink, FeedbackSocket>;

/// The page stream over this host's send queues, a thread for each.
pub(super) struct OutgoingStream {
    pub(super) lanes: Vec<Lane>,
    pub(super) placement: Placement,
    pub(super) frames: FrameLayout,
    pub(super) bandwidth: Bandwidth,
    /// Set when nobody waits for the senders any more.
    pub(super) stop: Arc<AtomicBool>,
    pub(super) rounds: Vec<LaneRound>,
    pub(super) layout: Arc<RamLayout>,
    pub(super) mappings: Arc<Vec<Mapping>>,
    pub(super) sent: Arc<AtomicPageSet>,
    /// Hashes of what was sent, where dirty pages are found by the huge page.
    pub(super) hashes: Option<Arc<SentHashes>>,
    pub(super) progress: Arc<AtomicU64>,
}

impl Drop for OutgoingStream {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}

impl OutgoingStream {
    /// Runs `work` with the lanes on threads of their own. A caller that goes away leaves them to the stop flag.
    async fn with_lanes<T: Send + 'static>(
        &mut self,
        work: impl FnOnce(&mut Vec<Lane>, &AtomicBool) -> Result<T, SendError> + Send + 'static,
    ) -> Result<T, MigrationError> {
        let mut lanes = std::mem::take(&mut self.lanes);
        let stop = Arc::clone(&self.stop);
        let placement = self.placement.clone();
        let task = tokio::task::spawn_blocking(move || {
            let _placed = placement.enter();
            let result = work(&mut lanes, &stop);
            (lanes, result)
        });
        let (lanes, result) =
            task.await.map_err(|error| MigrationError::Host(format!("a sender thread failed: {error}")))?;
        self.lanes = lanes;
        Ok(result?)
    }
}

impl PageStream for OutgoingStream {
    async fn probe(&mut self, count: u32) -> Result<(), MigrationError> {
        let frames = self.frames;
        self.with_lanes(move |lanes, stop| match lanes.first_mut() {
            Some(lane) => lane.probe(frames, count, stop),
            None => Ok(()),
        })
        .await
    }

    async fn send(&mut self, epoch: u32, pages: Arc<PageSet>) -> Result<RoundSent, MigrationError> {
        let (layout, mappings) = (Arc::clone(&self.layout), Arc::clone(&self.mappings));
        let (sent, progress) = (Arc::clone(&self.sent), Arc::clone(&self.progress));
        let hashes = self.hashes.clone();
        let (rounds, looked_at, unchanged) = self
            .with_lanes(move |lanes, stop| {
                let hashes = hashes.as_deref();
                let view = Pages { layout: &layout, mappings: &mappings, sent: &sent, hashes };
                let Some(hashes) = hashes else {
                    return Ok((send_round(lanes, epoch, view, &pages, stop, &progress)?, 0, 0));
                };
                let Changed { pages: changed, looked_at, unchanged } =
                    hashes.changed(&pages, &layout, &mappings);
                progress.fetch_add(unchanged, Ordering::Relaxed);
                let rounds = send_round(lanes, epoch, view, &changed, stop, &progress);
                if rounds.is_err() {
                    // Hashes were noted of pages that were never sent.
                    hashes.forget(&changed);
                }
                Ok((rounds?, looked_at, unchanged))
            })
            .await?;
        self.rounds = rounds;
        let mut packed = Packed::default();
        self.rounds.iter().for_each(|round| packed += round.packed);
        Ok(RoundSent {
            frames: self.rounds.iter().map(|round| round.frames).collect(),
            data_pages: self.rounds.iter().map(|round| round.data_pages).sum(),
            zero_pages: self.rounds.iter().map(|round| round.zero_pages).sum(),
            looked_at,
            unchanged_pages: unchanged,
            packed,
            wire_bytes: self.rounds.iter().map(|round| round.wire_bytes).sum(),
            stalls: self.rounds.iter().map(|round| round.stalls).collect(),
            bandwidth_limit: self.bandwidth.limit(),
            transit: self.lanes.iter().map(LaneSender::transit).max().unwrap_or_default(),
        })
    }

    fn lost(&mut self, pages: &PageSet, losses: &[LaneLosses]) -> PageSet {
        let mut again = PageSet::new(pages.bound());
        for (index, (lane, round)) in self.lanes.iter_mut().zip(&self.rounds).enumerate() {
            let mut lost = 0;
            for losses in losses.iter().filter(|losses| usize::from(losses.lane) == index) {
                round.lost_pages(losses, pages, &mut again);
                lost += losses.frames();
            }
            lane.on_round(lost);
        }
        if let Some(hashes) = &self.hashes {
            hashes.forget(&again);
        }
        again
    }
}

/// Sends `pages`, each lane its part on a thread of its own.
fn send_round(
    lanes: &mut [Lane],
    epoch: u32,
    view: Pages<'_>,
    pages: &PageSet,
    stop: &AtomicBool,
    progress: &AtomicU64,
) -> Result<Vec<LaneRound>, SendError> {
    let borders = pages.shares(lanes.len());
    std::thread::scope(|scope| {
        let mut work = lanes.iter_mut().zip(borders.windows(2)).map(|(lane, border)| {
            let (from, to) = (border[0], border[1]);
            let numbers = pages.iter_from(from).take_while(move |&page| page < to);
            move || lane.send_round(epoch, view, numbers, stop, progress)
        });
        // The first lane's work is done by this thread.
        let own = work.next();
        let others: Vec<_> = work.map(|work| scope.spawn(work)).collect();
        let mut rounds = Vec::with_capacity(others.len() + 1);
        rounds.extend(own.map(|work| work()));
        for thread in others {
            rounds.push(
                thread.join().unwrap_or_else(|_| {
                    Err(SendError::Link(std::io::Error::other("a sender thread panicked")))
                }),
            );
        }
        rounds.into_iter().collect()
    })
}
