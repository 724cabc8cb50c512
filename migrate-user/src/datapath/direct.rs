//! Sending pages from where they lie: the guest's RAM itself is part of the UMEM.

use super::sink::{FrameSink, XskSink};
use crate::{
    memory::{PageSet, RESERVE_CHUNK, RamLayout},
    xsk::{CHUNK_SIZE, ChainChunk, TxQueue},
};

/// Consecutive pages of one memory backend.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stretch {
    /// Index of the backend.
    pub backend: u16,
    /// First page within its file.
    pub page: u64,
    /// How many.
    pub pages: u64,
}

/// Which of a guest's pages lie in a UMEM, and where.
///
/// Registering a UMEM makes every page of it exist. So only whole chunks of [`RESERVE_CHUNK`] pages are laid out of which all
/// exist already: the guest's holes stay holes. Pages of other chunks, and those that come to be later, are copied.
#[derive(Debug)]
pub struct LaidOut {
    /// By chunk: its place among those that are laid out.
    places: Vec<Option<u32>>,
    stretches: Vec<Stretch>,
}

impl LaidOut {
    /// All that can be of a guest of which the pages `existing` exist.
    pub fn of(existing: &PageSet, layout: &RamLayout) -> Self {
        let mut places = vec![None; layout.pages().div_ceil(RESERVE_CHUNK) as usize];
        let mut stretches: Vec<Stretch> = Vec::new();
        let mut place = 0;
        for (start, end) in existing.runs() {
            for chunk in start.div_ceil(RESERVE_CHUNK)..end / RESERVE_CHUNK {
                let first = layout.locate(chunk * RESERVE_CHUNK);
                if layout.locate((chunk + 1) * RESERVE_CHUNK - 1).backend != first.backend {
                    continue;
                }
                places[chunk as usize] = Some(place);
                place += 1;
                match stretches.last_mut() {
                    Some(last) if last.backend == first.backend && last.page + last.pages == first.page => {
                        last.pages += RESERVE_CHUNK;
                    }
                    _ => stretches.push(Stretch {
                        backend: first.backend,
                        page: first.page,
                        pages: RESERVE_CHUNK,
                    }),
                }
            }
        }
        Self { places, stretches }
    }

    /// What is to follow each other in the UMEM.
    pub fn stretches(&self) -> &[Stretch] {
        &self.stretches
    }

    /// Pages laid out.
    pub fn pages(&self) -> u64 {
        self.stretches.iter().map(|stretch| stretch.pages).sum()
    }

    /// Bytes from the first laid out to page `number`, if that is.
    fn offset(&self, number: u64) -> Option<u64> {
        let place = (*self.places.get((number / RESERVE_CHUNK) as usize)?)?;
        Some((u64::from(place) * RESERVE_CHUNK + number % RESERVE_CHUNK) * CHUNK_SIZE as u64)
    }
}

/// A send queue with a guest's RAM in its UMEM. Slots hold the heads of frames, and pages that have to be copied; a slot
/// has a chunk for the head and one for each page of a frame.
pub struct DirectSink {
    sink: XskSink,
    pages: LaidOut,
    /// Where the first page lies in the UMEM, bytes.
    pages_at: u64,
    /// Chunks of the frame being made, kept for its memory.
    chain: Vec<ChainChunk>,
}

impl DirectSink {
    /// A sink over `queue`, in whose UMEM `pages` follow each other from `pages_at` bytes on.
    pub fn new(queue: TxQueue, pages: LaidOut, pages_at: u64) -> Self {
        Self { sink: XskSink::new(queue), pages, pages_at, chain: Vec::new() }
    }

    /// Lets `fill` make one frame and queues it, as [`FrameSink::frame`] does; `fill` returns the length of the head.
    pub(super) fn frame_of_pages(
        &mut self,
        fill: impl FnOnce(&mut Chain<'_>) -> usize,
    ) -> std::io::Result<bool> {
        let (pages, pages_at) = (&self.pages, self.pages_at);
        self.sink.chain(&mut self.chain, |slot, chunks| {
            let (head, copies) = slot.split_at_mut(CHUNK_SIZE);
            fill(&mut Chain { head, copies, chunks, pages, pages_at })
        })
    }
}

impl FrameSink for DirectSink {
    fn frame(&mut self, fill: impl FnOnce(&mut [u8]) -> usize) -> std::io::Result<bool> {
        self.sink.frame(fill)
    }

    fn flush(&mut self) -> std::io::Result<usize> {
        self.sink.flush()
    }

    fn direct(&mut self) -> Option<&mut DirectSink> {
        Some(self)
    }
}

/// A frame that is being made of a head and whole pages.
pub(super) struct Chain<'a> {
    /// For headers and descriptors, one chunk.
    pub head: &'a mut [u8],
    copies: &'a mut [u8],
    chunks: &'a mut Vec<ChainChunk>,
    pages: &'a LaidOut,
    pages_at: u64,
}

impl Chain<'_> {
    /// Where page `number` lies in the UMEM, if it does.
    pub fn lies(&self, number: u64) -> Option<ChainChunk> {
        Some(ChainChunk::At(self.pages_at + self.pages.offset(number)?))
    }

    /// Adds a page that lies there.
    pub fn add(&mut self, page: ChainChunk) {
        self.chunks.push(page);
    }

    /// Where a copy of the next page goes. The slot has a chunk for every page of a frame.
    pub fn copy(&mut self) -> &mut [u8] {
        let at = self.chunks.len() * CHUNK_SIZE;
        &mut self.copies[at..at + CHUNK_SIZE]
    }

    /// Adds the page that was copied.
    pub fn add_copy(&mut self) {
        // Behind the head's chunk.
        self.chunks.push(ChainChunk::OfSlot(self.chunks.len() as u8 + 1));
    }

    /// The head, and for each page added its copy, if it is one.
    pub fn parts(&mut self) -> (&mut [u8], impl Iterator<Item = Option<&[u8]>>) {
        let copies = self.copies.chunks(CHUNK_SIZE).zip(&*self.chunks);
        (self.head, copies.map(|(copy, chunk)| matches!(chunk, ChainChunk::OfSlot(_)).then_some(copy)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::Backend;

    #[test]
    fn only_chunks_without_holes_are_laid_out() {
        let backend = |id: &str, chunks: u64| Backend { id: id.into(), size: chunks << 21 };
        let layout = RamLayout::new(vec![backend("a", 4), backend("b", 3)]);
        let mut existing = PageSet::new(layout.pages());
        existing.insert_range(0, layout.pages());
        existing.remove(512 + 7);
        let laid = LaidOut::of(&existing, &layout);
        let stretch =
            |backend, chunk: u64, chunks: u64| Stretch { backend, page: chunk * 512, pages: chunks * 512 };
        assert_eq!(laid.stretches(), [stretch(0, 0, 1), stretch(0, 2, 2), stretch(1, 0, 3)]);
        assert_eq!(laid.pages(), 6 * 512);
        assert_eq!(laid.offset(511), Some(511 * 4096));
        assert_eq!(laid.offset(512), None, "a hole is near");
        assert_eq!(laid.offset(2 * 512 + 1), Some((512 + 1) * 4096));
        assert_eq!(laid.offset(4 * 512), Some(3 * 512 * 4096), "the second backend");
        assert_eq!(laid.offset(7 * 512), None, "beyond the guest");
    }

    #[test]
    fn a_chunk_of_two_backends_is_not_laid_out() {
        let layout = RamLayout::new(vec![
            Backend { id: "a".into(), size: 256 * 4096 },
            Backend { id: "b".into(), size: 1024 * 4096 },
        ]);
        let mut existing = PageSet::new(layout.pages());
        existing.insert_range(0, layout.pages());
        let laid = LaidOut::of(&existing, &layout);
        assert_eq!(laid.stretches(), [Stretch { backend: 1, page: 256, pages: 512 }]);
        assert_eq!((laid.offset(255), laid.offset(512)), (None, Some(0)));
    }
}
