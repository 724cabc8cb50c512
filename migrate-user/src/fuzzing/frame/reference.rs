//! What a frame must do to a guest, as the protocol's text says and in other words than the receiver's.

use std::collections::BTreeSet;

use migrate_common::{
    PAGE_SIZE,
    wire::{DESCRIPTOR_LEN, FrameHeader, FrameKind, MAX_UNPACKED, Packing, PageDescriptor},
};

use super::{BEYOND, CANARY, LANES, PAGES};
use crate::memory::Mapping;

/// A frame whose guard held.
#[derive(Clone)]
pub(super) struct Sent {
    pub(super) header: FrameHeader,
    pub(super) descriptors: Vec<[u8; DESCRIPTOR_LEN]>,
    /// As it unpacks.
    pub(super) payload: Vec<u8>,
    /// That it is packed and does not unpack to what the descriptors say.
    pub(super) broken: bool,
}

impl Sent {
    /// A frame with this payload as it came.
    pub(super) fn new(header: FrameHeader, descriptors: Vec<[u8; DESCRIPTOR_LEN]>, payload: Vec<u8>) -> Self {
        let described = descriptors.iter().filter_map(|bytes| PageDescriptor::parse(bytes).ok());
        let due: usize = described.map(|descriptor| descriptor.payload_len()).sum();
        let unpacked = match header.packing {
            Packing::Plain => Some(payload),
            _ if due > MAX_UNPACKED => None,
            Packing::Lz4 => lz4_flex::block::decompress(&payload, due).ok(),
            Packing::Zstd => zstd::bulk::decompress(&payload, due).ok(),
        };
        let packed = header.packing != Packing::Plain;
        let broken = packed && (due == 0 || unpacked.as_ref().is_none_or(|bytes| bytes.len() != due));
        Self { header, descriptors, payload: unpacked.unwrap_or_default(), broken }
    }
}

/// A guest's memory and one epoch after the other.
pub(super) struct Reference {
    /// Pages that each backend has.
    pub(super) pages: [u64; PAGES.len()],
    /// Bytes of each file, those behind its backend included.
    memory: [Vec<u8>; PAGES.len()],
    /// The one that is open.
    pub(super) epoch: u32,
    /// Lanes and numbers of the frames that were taken in it.
    pub(super) seen: BTreeSet<(u16, u32)>,
}

impl Reference {
    pub(super) fn new() -> Self {
        let memory = PAGES.map(|pages| vec![CANARY; (pages + BEYOND) as usize * PAGE_SIZE]);
        Self { pages: PAGES, memory, epoch: 1, seen: BTreeSet::new() }
    }

    /// As [`new`](Self::new), in the memory that is there.
    pub(super) fn begin(&mut self) {
        self.memory.iter_mut().for_each(|file| file.fill(CANARY));
        self.epoch = 1;
        self.seen.clear();
    }

    /// Places a frame, or says that it must not be taken. `numbered` tells whether its number can belong to an epoch.
    pub(super) fn take(&mut self, sent: &Sent, numbered: bool) -> bool {
        let header = sent.header;
        let meant = header.kind == FrameKind::Pages
            && header.epoch == self.epoch
            && header.lane < LANES
            && numbered
            && self.fits(sent)
            && self.seen.insert((header.lane, header.sequence));
        if meant {
            self.place(sent);
        }
        meant
    }

    /// Ends the epoch.
    pub(super) fn close(&mut self) {
        self.epoch += 1;
        self.seen.clear();
    }

    fn fits(&self, sent: &Sent) -> bool {
        let (mut payload, mut cleared) = (0, 0);
        for bytes in &sent.descriptors {
            let Ok(descriptor) = PageDescriptor::parse(bytes) else { return false };
            let (backend, end) = match descriptor {
                PageDescriptor::Data { backend, page, .. } => (backend, page.checked_add(1)),
                PageDescriptor::Zero { backend, page, pages } => {
                    cleared += u64::from(pages);
                    (backend, page.checked_add(pages.into()))
                }
            };
            payload += descriptor.payload_len();
            let pages = self.pages.get(usize::from(backend));
            if pages.zip(end).is_none_or(|(pages, end)| end > *pages) {
                return false;
            }
        }
        !sent.broken && payload == sent.payload.len() && cleared <= self.pages.iter().sum()
    }

    fn place(&mut self, sent: &Sent) {
        let mut payload = sent.payload.as_slice();
        for descriptor in sent.descriptors.iter().filter_map(|bytes| PageDescriptor::parse(bytes).ok()) {
            match descriptor {
                PageDescriptor::Data { backend, page, offset, length } => {
                    let (now, rest) = payload.split_at(length.into());
                    let at = page as usize * PAGE_SIZE + usize::from(offset);
                    self.memory[usize::from(backend)][at..at + now.len()].copy_from_slice(now);
                    payload = rest;
                }
                PageDescriptor::Zero { backend, page, pages } => {
                    let (from, end) = (page as usize, page as usize + pages as usize);
                    self.memory[usize::from(backend)][from * PAGE_SIZE..end * PAGE_SIZE].fill(0);
                }
            }
        }
    }

    /// Whether the files hold what they should.
    ///
    /// # Errors
    /// The first page that does not.
    pub(super) fn compare(&self, files: &[Mapping]) -> Result<(), String> {
        let mut found = [0; PAGE_SIZE];
        for (file, expected) in files.iter().zip(&self.memory) {
            for (page, expected) in expected.chunks_exact(PAGE_SIZE).enumerate() {
                file.read(page as u64, 0, &mut found).map_err(|error| error.to_string())?;
                if found != expected {
                    return Err(format!(
                        "page {page} of {} holds something else than was sent",
                        file.path().display()
                    ));
                }
            }
        }
        Ok(())
    }
}
