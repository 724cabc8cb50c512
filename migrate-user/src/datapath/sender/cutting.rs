//! How pages become frames.

use migrate_common::{
    PAGE_SIZE,
    wire::{DESCRIPTOR_LEN, FrameKind, HEADER_LEN, PageDescriptor},
};

use super::{FrameNumber, LaneSender, SendError, ahead::Ahead, packed::whole, round::Round};
use crate::{
    datapath::{feedback::FeedbackRx, sink::FrameSink},
    memory::BackendPage,
};

/// Pages of a frame that are packed for a sample: more say no more.
const SAMPLED: usize = 4;

impl<S: FrameSink, F: FeedbackRx> LaneSender<S, F> {
    /// One frame of as many whole pages as fit.
    pub(super) fn whole_pages(
        &mut self,
        round: &mut Round<'_>,
        source: &mut Ahead<impl Iterator<Item = u64>>,
    ) -> Result<(), SendError> {
        let capacity = self.config.frames.pages_per_frame;
        let zero_capacity = self.config.frames.zero_runs;
        let descriptors_at = self.config.path.len() + HEADER_LEN;
        let payload_at = descriptors_at + capacity * DESCRIPTOR_LEN;
        let sampled = self.packs.auto.wants_sample();
        let mut sample = Vec::new();
        self.emit(round, |round, header, buffer| {
            let mut taken = std::mem::take(&mut round.taken);
            taken.clear();
            let (descriptors, payload) = buffer[descriptors_at..].split_at_mut(capacity * DESCRIPTOR_LEN);
            round.take_pages(source, &mut payload[..capacity * PAGE_SIZE], zero_capacity, &mut taken);
            let count = taken.len();
            for (index, &(number, place)) in taken.iter().enumerate() {
                let at = index * DESCRIPTOR_LEN;
                descriptors[at..at + DESCRIPTOR_LEN].copy_from_slice(&whole(place).to_bytes());
                round.span(index == 0, number);
            }
            round.taken = taken;
            if 0 < count && count < capacity {
                let shorter = descriptors_at + count * DESCRIPTOR_LEN;
                buffer.copy_within(payload_at..payload_at + count * PAGE_SIZE, shorter);
            }
            header.descriptors = count as u16;
            header.payload = (count * PAGE_SIZE) as u32;
            if sampled.is_some() {
                let at = descriptors_at + count * DESCRIPTOR_LEN;
                sample.extend_from_slice(&buffer[at..at + count.min(SAMPLED) * PAGE_SIZE]);
            }
        })?;
        if let Some(codec) = sampled.filter(|_| !sample.is_empty()) {
            self.packs.sample(codec, &sample);
        }
        Ok(())
    }

    /// One full frame of pages that are encrypted from where they are, without being copied into it. `false`, and nothing is done, where
    /// the next pages are not like that, or where it spares nothing.
    pub(super) fn full_frame(
        &mut self,
        round: &mut Round<'_>,
        source: &mut Ahead<impl Iterator<Item = u64>>,
    ) -> Result<bool, SendError> {
        if !self.sealer.spares_a_copy() {
            return Ok(false);
        }
        let sampled = self.packs.auto.wants_sample();
        // A hash must be of the bytes that are sent, and a sample is of bytes that stay.
        let mapped = round.pages.hashes.is_none() && sampled.is_none();
        let capacity = self.config.frames.pages_per_frame;
        let Some(full) = source.take_full(&round.pages, capacity, mapped)? else { return Ok(false) };
        self.wait_for_room(round)?;
        let number =
            FrameNumber { kind: FrameKind::Pages, epoch: round.epoch, sequence: round.result.frames };
        let at = self.config.path.len() + HEADER_LEN;
        let len = self.queue(round.stop, number, |sealer, path, mut header, buffer| {
            let descriptors = buffer[at..].chunks_exact_mut(DESCRIPTOR_LEN);
            for (index, (&(number, place), descriptor)) in full.pages.iter().zip(descriptors).enumerate() {
                descriptor.copy_from_slice(&whole(place).to_bytes());
                round.sends(number, full.content.map(|content| &content[index * PAGE_SIZE..][..PAGE_SIZE]));
                round.span(index == 0, number);
            }
            header.descriptors = capacity as u16;
            header.payload = (capacity * PAGE_SIZE) as u32;
            let (_, first) = full.pages[0];
            let mapping = &round.pages.mappings[usize::from(first.backend)];
            match full.content {
                Some(content) => sealer.complete_with(buffer, path, header, content),
                None => mapping
                    .lend(first.page, capacity, |pages| sealer.complete_with(buffer, path, header, pages)),
            }
        })?;
        self.sent(round, len)?;
        if let (Some(codec), Some(content)) = (sampled, full.content) {
            self.packs.sample(codec, &content[..capacity.min(SAMPLED) * PAGE_SIZE]);
        }
        Ok(true)
    }

    /// One page in as many frames as it takes.
    pub(super) fn fragments(
        &mut self,
        round: &mut Round<'_>,
        source: &mut Ahead<impl Iterator<Item = u64>>,
    ) -> Result<(), SendError> {
        let Some(page) = round.read(source) else { return Ok(()) };
        if !round.judge(&page) {
            return Ok(());
        }
        self.page_in_fragments(round, page.number, page.place, page.content)?;
        if let Some(codec) = self.packs.auto.wants_sample() {
            self.packs.sample(codec, page.content);
        }
        Ok(())
    }

    /// The frames of one page that does not fit one.
    pub(super) fn page_in_fragments(
        &mut self,
        round: &mut Round<'_>,
        number: u64,
        place: BackendPage,
        content: &[u8],
    ) -> Result<(), SendError> {
        let descriptor_at = self.config.path.len() + HEADER_LEN;
        let payload_at = descriptor_at + DESCRIPTOR_LEN;
        for (index, fragment) in content.chunks(self.config.frames.fragment).enumerate() {
            let descriptor = PageDescriptor::Data {
                backend: place.backend,
                page: place.page,
                offset: (index * self.config.frames.fragment) as u16,
                length: fragment.len() as u16,
            };
            self.emit(round, |round, header, buffer| {
                buffer[descriptor_at..payload_at].copy_from_slice(&descriptor.to_bytes());
                buffer[payload_at..payload_at + fragment.len()].copy_from_slice(fragment);
                round.span(true, number);
                header.descriptors = 1;
                header.payload = fragment.len() as u32;
            })?;
        }
        Ok(())
    }

    /// One frame with all zero runs collected so far.
    pub(super) fn zero_frame(&mut self, round: &mut Round<'_>) -> Result<(), SendError> {
        let runs = std::mem::take(&mut round.zero_runs);
        let descriptors_at = self.config.path.len() + HEADER_LEN;
        self.emit(round, |round, header, buffer| {
            for (index, &(number, pages)) in runs.iter().enumerate() {
                let place = round.pages.layout.locate(number);
                let descriptor = PageDescriptor::Zero { backend: place.backend, page: place.page, pages };
                let at = descriptors_at + index * DESCRIPTOR_LEN;
                buffer[at..at + DESCRIPTOR_LEN].copy_from_slice(&descriptor.to_bytes());
                round.span(index == 0, number);
                round.span(false, number + u64::from(pages) - 1);
            }
            header.descriptors = runs.len() as u16;
            header.payload = 0;
        })
    }
}
