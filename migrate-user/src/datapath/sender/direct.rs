//! Frames whose pages are not copied.

use migrate_common::{
    PAGE_SIZE,
    wire::{DESCRIPTOR_LEN, FrameKind, HEADER_LEN},
};

use super::{
    FrameNumber, LaneSender, SendError,
    ahead::{Ahead, ReadPage},
    check,
    packed::whole,
    round::Round,
};
use crate::{
    checksum::Crc32c,
    datapath::{FeedbackRx, FrameSink, Protection, direct::Chain, protection::complete_apart},
    memory::{BackendPage, Mapping},
};

impl<S: FrameSink, F: FeedbackRx> LaneSender<S, F> {
    /// One frame of as many whole pages as fit, taken from where they lie. `false`, and nothing is done, where the link cannot
    /// do that, or where frames are sealed, which takes a copy.
    pub(super) fn direct_pages(
        &mut self,
        round: &mut Round<'_>,
        source: &mut Ahead<impl Iterator<Item = u64>>,
    ) -> Result<bool, SendError> {
        if !matches!(self.config.protection, Protection::Checksum) || self.sink.direct().is_none() {
            return Ok(false);
        }
        self.wait_for_room(round)?;
        let mut header = self.header(FrameNumber {
            kind: FrameKind::Pages,
            epoch: round.epoch,
            sequence: round.result.frames,
        });
        let (path, frames) = (&self.config.path, &self.config.frames);
        let mut taken = std::mem::take(&mut round.taken);
        taken.clear();
        let mut len = 0;
        loop {
            let Some(sink) = self.sink.direct() else { return Ok(false) };
            let queued = sink.frame_of_pages(|chain| {
                let descriptors_at = path.len() + HEADER_LEN;
                while round.failure.is_none()
                    && taken.len() < frames.pages_per_frame
                    && round.zero_runs.len() < frames.zero_runs
                {
                    let Some(number) = source.take_number() else { break };
                    let Some(place) = round.chain_page(number, chain) else { continue };
                    let at = descriptors_at + taken.len() * DESCRIPTOR_LEN;
                    chain.head[at..at + DESCRIPTOR_LEN].copy_from_slice(&whole(place).to_bytes());
                    round.span(taken.is_empty(), number);
                    taken.push((number, place));
                }
                if taken.is_empty() {
                    return 0;
                }
                header.descriptors = taken.len() as u16;
                header.payload = (taken.len() * PAGE_SIZE) as u32;
                len = frames.prefix + header.frame_len();
                let (head, copies) = chain.parts();
                complete_apart(head, path, header, |sum| checksum(round.pages.mappings, &taken, copies, sum))
            })?;
            if queued {
                break;
            }
            check(round.stop)?;
            if self.sink.flush()? > 0 {
                std::thread::yield_now();
            }
        }
        round.taken = taken;
        self.sent(round, len)?;
        Ok(true)
    }
}

impl Round<'_> {
    /// Adds a page to a frame; `None` when it turns out to be zero, which is noted instead.
    ///
    /// A page that was sent before was written since, and is likely to be written again while it is on its way, so that its
    /// frame's checksum would not hold and its neighbours had to be sent again too. So it is copied; and so is a page whose hash
    /// is kept, which must be of the bytes that are sent.
    fn chain_page(&mut self, number: u64, chain: &mut Chain<'_>) -> Option<BackendPage> {
        let copied = self.pages.hashes.is_some() || self.pages.sent.contains(number);
        let place = self.pages.layout.locate(number);
        let mapping = &self.pages.mappings[usize::from(place.backend)];
        let Some(lies) = chain.lies(number).filter(|_| !copied) else {
            let content = chain.copy();
            if let Err(error) = mapping.read(place.page, 0, content) {
                self.failure = Some(error);
                return None;
            }
            if !self.judge(&ReadPage { number, place, content }) {
                return None;
            }
            chain.add_copy();
            return Some(place);
        };
        if !self.note(number, place, mapping.is_zero(place.page)) {
            return None;
        }
        chain.add(lies);
        Some(place)
    }
}

/// Goes on with `sum` over pages, or the copies that are sent instead of them.
fn checksum<'a>(
    mappings: &[Mapping],
    pages: &[(u64, BackendPage)],
    copies: impl Iterator<Item = Option<&'a [u8]>>,
    sum: &mut Crc32c,
) {
    for ((_, place), copy) in pages.iter().zip(copies) {
        match copy {
            Some(copy) => sum.update(copy),
            None => mappings[usize::from(place.backend)].checksum(place.page, sum),
        }
    }
}
