//! Packed pages: as many as fill a frame, as one block.

use std::time::{Duration, Instant};

use migrate_common::{
    PAGE_SIZE,
    wire::{DESCRIPTOR_LEN, HEADER_LEN, MAX_UNPACKED, Packing, PageDescriptor},
};

use super::{LaneSender, SendError, ahead::Ahead, round::Round};
use crate::{
    datapath::{
        feedback::FeedbackRx,
        packing::{Auto, Fill, Method, Packer, Packings, Work},
        sink::FrameSink,
    },
    memory::BackendPage,
};

/// A block must be smaller than its pages by at least this divisor of them, or it is not worth unpacking.
const GAIN: usize = 32;

/// What a lane packs with.
pub(super) struct Packs {
    pub(super) auto: Auto,
    /// Made when first needed, and out of here while the lane packs.
    tools: Option<Box<Tools>>,
}

#[derive(Default)]
struct Tools {
    packer: Packer,
    fill: Fill,
    staged: Staged,
}

/// Pages that are copied out of the guest and wait to be packed.
#[derive(Default)]
struct Staged {
    bytes: Vec<u8>,
    pages: Vec<(u64, BackendPage)>,
}

/// What was packed in a round.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Packed {
    /// Pages sent packed.
    pub pages: u64,
    /// Bytes that they became.
    pub bytes: u64,
    /// Time spent packing, also in vain.
    pub took: Duration,
}

impl std::ops::AddAssign for Packed {
    fn add_assign(&mut self, other: Self) {
        self.pages += other.pages;
        self.bytes += other.bytes;
        self.took += other.took;
    }
}

impl Packs {
    /// For frames with `room` bytes of descriptors and payload, of which `window` may be on their way.
    pub(super) fn new(packings: Packings, room: usize, window: u32) -> Self {
        Self { auto: Auto::new(packings, room, window), tools: None }
    }

    /// Packs pages that went as they are, to see what it would do to them.
    pub(super) fn sample(&mut self, method: Method, pages: &[u8]) {
        sample(&mut self.auto, &mut self.tools.get_or_insert_default().packer, method, pages);
    }
}

fn sample(auto: &mut Auto, packer: &mut Packer, method: Method, pages: &[u8]) {
    let begun = Instant::now();
    let bytes = packer.pack(method, pages, pages.len()).map(<[u8]>::len);
    auto.sampled(method, pages.len() / PAGE_SIZE, bytes, begun.elapsed());
}

impl Staged {
    fn page(&self, index: usize) -> &[u8] {
        &self.bytes[index * PAGE_SIZE..(index + 1) * PAGE_SIZE]
    }
}

impl<S: FrameSink, F: FeedbackRx> LaneSender<S, F> {
    /// Pages for about one frame, packed by `method`, in as many frames as they take.
    pub(super) fn packed_pages(
        &mut self,
        round: &mut Round<'_>,
        source: &mut Ahead<impl Iterator<Item = u64>>,
        method: Method,
    ) -> Result<(), SendError> {
        let frames = self.config.frames;
        let mut tools = self.packs.tools.take().unwrap_or_default();
        let wanted = tools.fill.pages(frames.body_room()).max(frames.pages_per_frame);
        let staged = &mut tools.staged;
        staged.pages.clear();
        staged.bytes.resize(MAX_UNPACKED, 0);
        let room = &mut staged.bytes[..wanted * PAGE_SIZE];
        round.take_pages(source, room, frames.zero_runs, &mut staged.pages);
        let mut done = 0;
        while done < tools.staged.pages.len() {
            done += self.packed_frame(round, &mut tools, done, method)?;
        }
        if done > 0
            && let Some(other) = self.packs.auto.wants_sample()
        {
            let Tools { packer, staged, .. } = &mut *tools;
            sample(&mut self.packs.auto, packer, other, &staged.bytes[..done * PAGE_SIZE]);
        }
        self.packs.tools = Some(tools);
        Ok(())
    }

    /// One frame with the staged pages from `from` on, or the frames of one page that does not fit any. Returns how many
    /// pages they carry.
    fn packed_frame(
        &mut self,
        round: &mut Round<'_>,
        tools: &mut Tools,
        from: usize,
        method: Method,
    ) -> Result<usize, SendError> {
        let frames = self.config.frames;
        let Tools { packer, fill, staged } = tools;
        let left = staged.pages.len() - from;
        // As many pages fit without packing.
        let plain = frames.pages_per_frame.clamp(1, left);
        let mut count = left;
        loop {
            let room = frames.body_room().saturating_sub(count * DESCRIPTOR_LEN);
            let pages = &staged.bytes[from * PAGE_SIZE..(from + count) * PAGE_SIZE];
            let worth = pages.len() - pages.len() / GAIN;
            let begun = Instant::now();
            let block = packer.pack(method, pages, room.min(worth));
            let took = begun.elapsed();
            round.result.packed.took += took;
            self.packs.auto.packed(method, count, block.map(<[u8]>::len), took);
            if let Some(block) = block {
                fill.packed(count, block.len());
                self.frame_of(round, &staged.pages[from..from + count], block, method.codec().packing())?;
                round.result.packed.pages += count as u64;
                round.result.packed.bytes += block.len() as u64;
                return Ok(count);
            }
            fill.too_many(count, room);
            if count <= plain {
                break;
            }
            count = fill.pages(frames.body_room()).clamp(plain, count - 1);
        }
        // Packing gains nothing here.
        if frames.frames_per_page > 1 {
            let (number, place) = staged.pages[from];
            self.page_in_fragments(round, number, place, staged.page(from))?;
            return Ok(1);
        }
        let bytes = &staged.bytes[from * PAGE_SIZE..(from + plain) * PAGE_SIZE];
        self.frame_of(round, &staged.pages[from..from + plain], bytes, Packing::Plain)?;
        Ok(plain)
    }

    /// A frame with whole `pages` and this payload.
    fn frame_of(
        &mut self,
        round: &mut Round<'_>,
        pages: &[(u64, BackendPage)],
        payload: &[u8],
        packing: Packing,
    ) -> Result<(), SendError> {
        let at = self.config.path.len() + HEADER_LEN;
        self.emit(round, |round, header, buffer| {
            let mut at = at;
            for (index, &(number, place)) in pages.iter().enumerate() {
                buffer[at..at + DESCRIPTOR_LEN].copy_from_slice(&whole(place).to_bytes());
                round.span(index == 0, number);
                at += DESCRIPTOR_LEN;
            }
            buffer[at..at + payload.len()].copy_from_slice(payload);
            header.descriptors = pages.len() as u16;
            header.payload = payload.len() as u32;
            header.packing = packing;
        })
    }

    /// Tells the policy what was sent since it was last told.
    pub(super) fn tell_auto(&mut self, round: &mut Round<'_>) {
        if !self.packs.auto.decides() {
            return;
        }
        let sum = Work {
            frames: round.result.frames.into(),
            pages: round.result.data_pages,
            wire_bytes: round.result.wire_bytes,
        };
        let told = std::mem::replace(&mut round.told, sum);
        let news = Work {
            frames: sum.frames - told.frames,
            pages: sum.pages - told.pages,
            wire_bytes: sum.wire_bytes - told.wire_bytes,
        };
        self.packs.auto.sent(Instant::now(), news, thread_cpu);
    }
}

/// The descriptor of a whole page.
pub(super) fn whole(place: BackendPage) -> PageDescriptor {
    PageDescriptor::Data { backend: place.backend, page: place.page, offset: 0, length: PAGE_SIZE as u16 }
}

/// CPU time that this thread has used.
pub(super) fn thread_cpu() -> Duration {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::ThreadCPUTime);
    Duration::try_from(time).unwrap_or_default()
}
