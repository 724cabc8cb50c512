//! The page stream that leaves this host.

use std::{
    ops::Range,
    sync::{
        Arc, OnceLock,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
};

use super::renewed::Renewed;

use crate::{
    agent::{link::LaneSink, placement::Placement},
    datapath::{
        Bandwidth, Changed, FeedbackSocket, FrameLayout, LaneLosses, LaneRound, LaneSender, Packed, Pages,
        SendError, SentHashes,
    },
    memory::{AtomicPageSet, Mapping, PageSet, RamLayout, TrackedRam},
    migration::{MigrationError, PageStream, RoundSent},
};

/// Fewest pages of a round for which it is worth finding out meanwhile what was written (64 MiB): less is sent before much is.
const RENEWED: u64 = 16 << 10;

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
    /// What is tracked of the guest's RAM, once it is.
    pub(super) tracked: Arc<OnceLock<TrackedRam>>,
    /// Pages that are not of the last round and were found to be written meanwhile, if that was looked for.
    pub(super) written: Option<PageSet>,
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

    async fn send(
        &mut self,
        epoch: u32,
        pages: Arc<PageSet>,
        live: bool,
    ) -> Result<RoundSent, MigrationError> {
        // Huge pages are asked for whole, and their dirty bits say little of any page of 4 KiB.
        let renews = live && self.hashes.is_none() && pages.count() >= RENEWED;
        let tracked = self.tracked.get().filter(|_| renews).cloned();
        let (layout, mappings) = (Arc::clone(&self.layout), Arc::clone(&self.mappings));
        let (sent, progress) = (Arc::clone(&self.sent), Arc::clone(&self.progress));
        let hashes = self.hashes.clone();
        let (rounds, looked_at, unchanged) = self
            .with_lanes(move |lanes, stop| {
                let hashes = hashes.as_deref();
                let view = Pages { layout: &layout, mappings: &mappings, sent: &sent, hashes };
                let send = |lanes: &mut Vec<Lane>, pages: &PageSet| {
                    send_round(lanes, epoch, view, pages, tracked.as_ref(), stop, &progress)
                };
                let Some(hashes) = hashes else {
                    return Ok((send(lanes, &pages)?, 0, 0));
                };
                let Changed { pages: changed, looked_at, unchanged } =
                    hashes.changed(&pages, &layout, &mappings);
                progress.fetch_add(unchanged, Ordering::Relaxed);
                let rounds = send(lanes, &changed);
                if rounds.is_err() {
                    // Hashes were noted of pages that were never sent.
                    hashes.forget(&changed);
                }
                Ok((rounds?, looked_at, unchanged))
            })
            .await?;
        let (rounds, written): (_, Vec<_>) = rounds.into_iter().unzip();
        self.rounds = rounds;
        self.written = written.into_iter().flatten().reduce(|mut all, more| {
            all.union_with(&more);
            all
        });
        let mut packed = Packed::default();
        self.rounds.iter().for_each(|round| packed += round.packed);
        Ok(RoundSent {
            frames: self.rounds.iter().map(|round| round.frames).collect(),
            data_pages: self.rounds.iter().map(|round| round.data_pages).sum(),
            zero_pages: self.rounds.iter().map(|round| round.zero_pages).sum(),
            written_besides: self.written.as_ref().map_or(0, PageSet::count),
            looked_at,
            unchanged_pages: unchanged,
            packed,
            wire_bytes: self.rounds.iter().map(|round| round.wire_bytes).sum(),
            stalls: self.rounds.iter().map(|round| round.stalls).collect(),
            bandwidth_limit: self.bandwidth.limit(),
            transit: self.lanes.iter().map(LaneSender::transit).max().unwrap_or_default(),
            way: self.lanes.iter().filter_map(LaneSender::way).min().unwrap_or_default(),
        })
    }

    fn left(&mut self, pages: &PageSet, losses: &[LaneLosses]) -> PageSet {
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
        self.written.iter().for_each(|written| again.union_with(written));
        again
    }
}

/// What a lane sent, and what else it found written.
type LaneSent = (LaneRound, Option<PageSet>);

/// Sends `pages`, each lane its part on a thread of its own. With `tracked`, what was written is found out anew before each stretch
/// of pages is read.
fn send_round(
    lanes: &mut [Lane],
    epoch: u32,
    view: Pages<'_>,
    pages: &PageSet,
    tracked: Option<&TrackedRam>,
    stop: &AtomicBool,
    progress: &AtomicU64,
) -> Result<Vec<LaneSent>, SendError> {
    let borders = pages.shares(lanes.len());
    let send = |lane: &mut Lane, part: Range<u64>| {
        let Some(tracked) = tracked else {
            let numbers = pages.iter_from(part.start).take_while(|&page| page < part.end);
            return Ok((lane.send_round(epoch, view, numbers, stop, progress)?, None));
        };
        let mut asking = tracked.ask()?;
        let mut renewed = Renewed::new(pages, part, |stretch, found| asking.take(stretch, found));
        let round = lane.send_round(epoch, view, &mut renewed, stop, progress)?;
        Ok((round, Some(renewed.finish()?)))
    };
    std::thread::scope(|scope| {
        let mut work = lanes.iter_mut().zip(borders.windows(2)).map(|(lane, border)| {
            let part = border[0]..border[1];
            move || send(lane, part)
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
