//! Receivers that are wrong in one way each: what the target looks at must tell every one of them from the real one, by
//! the corpus in the repository alone. A target that nothing can fail proves nothing.

use std::sync::Arc;

use migrate_common::{
    PAGE_SIZE,
    wire::{Packing, PageDescriptor},
};

use super::{
    super::seeds::corpus,
    BEYOND, PAGES, Receives, look,
    reference::{Reference, Sent},
};
use crate::{datapath::Inbound, memory::Mapping, xsk::Packet};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Wrong {
    Nothing,
    OneByteFurther,
    NextPage,
    OtherBackend,
    OneByteLess,
    OtherBytes,
    NothingPlaced,
    RunOneLonger,
    RunOneShorter,
    RunsKept,
    PagesBehindTheEnd,
    PartOfARefusedFrame,
    EveryEpoch,
    OldEpochsOnly,
    EveryGuard,
    Duplicates,
    FirstLaneOnly,
    EveryBlock,
    PlainOnly,
}

const ALL: [Wrong; 18] = [
    Wrong::OneByteFurther,
    Wrong::NextPage,
    Wrong::OtherBackend,
    Wrong::OneByteLess,
    Wrong::OtherBytes,
    Wrong::NothingPlaced,
    Wrong::RunOneLonger,
    Wrong::RunOneShorter,
    Wrong::RunsKept,
    Wrong::PagesBehindTheEnd,
    Wrong::PartOfARefusedFrame,
    Wrong::EveryEpoch,
    Wrong::OldEpochsOnly,
    Wrong::EveryGuard,
    Wrong::Duplicates,
    Wrong::FirstLaneOnly,
    Wrong::EveryBlock,
    Wrong::PlainOnly,
];

struct Mutant {
    inbound: Arc<Inbound>,
    /// Decides what is taken; its memory is not looked at.
    rules: Reference,
    wrong: Wrong,
}

impl Receives for Mutant {
    fn take(&mut self, _: &Packet<'_>, sent: Option<&Sent>) -> bool {
        let Some(sent) = sent else { return self.wrong == Wrong::EveryGuard };
        let mut seen = sent.clone();
        match self.wrong {
            Wrong::EveryEpoch => seen.header.epoch = self.rules.epoch,
            Wrong::OldEpochsOnly => seen.header.epoch = seen.header.epoch.wrapping_add(1),
            Wrong::Duplicates => self.rules.seen.clear(),
            Wrong::EveryBlock if seen.broken => return true,
            Wrong::PlainOnly if seen.header.packing != Packing::Plain => return false,
            Wrong::FirstLaneOnly if seen.header.lane > 0 => return false,
            Wrong::PagesBehindTheEnd => self.rules.pages = PAGES.map(|pages| pages + 1),
            _ => {}
        }
        let numbered = seen.header.sequence.checked_add(1).is_some_and(|end| self.inbound.can_be(&[end]));
        let taken = self.rules.take(&seen, numbered);
        if taken || self.wrong == Wrong::PartOfARefusedFrame {
            self.place(sent);
        }
        taken
    }

    fn close(&mut self, _: u32) {
        self.rules.close();
    }
}

impl Mutant {
    fn place(&self, sent: &Sent) {
        let mut payload = sent.payload.as_slice();
        for descriptor in sent.descriptors.iter().map_while(|bytes| PageDescriptor::parse(bytes).ok()) {
            let backend = match descriptor {
                PageDescriptor::Data { backend, .. } | PageDescriptor::Zero { backend, .. } => {
                    usize::from(backend)
                }
            };
            // Of a refused frame, what is before its first mistake.
            let Some(file) = self.inbound.mappings().get(backend) else { return };
            match descriptor {
                PageDescriptor::Data { page, offset, length, .. } => {
                    if page >= PAGES[backend] + BEYOND || usize::from(length) > payload.len() {
                        return;
                    }
                    let (now, rest) = payload.split_at(length.into());
                    payload = rest;
                    self.data(backend, page as usize * PAGE_SIZE + usize::from(offset), now);
                }
                PageDescriptor::Zero { page, pages, .. } => {
                    let end = page.saturating_add(pages.into());
                    if end > PAGES[backend] + BEYOND {
                        return;
                    }
                    let end = match self.wrong {
                        Wrong::RunOneLonger => end + 1,
                        Wrong::RunOneShorter => end - 1,
                        Wrong::RunsKept | Wrong::NothingPlaced => page,
                        _ => end,
                    };
                    (page..end).for_each(|page| file.zero(page));
                }
            }
        }
    }

    fn data(&self, backend: usize, at: usize, bytes: &[u8]) {
        let file = |backend: usize| &self.inbound.mappings()[backend];
        match self.wrong {
            Wrong::OneByteFurther => put(file(backend), at + 1, bytes),
            Wrong::NextPage => put(file(backend), at + PAGE_SIZE, bytes),
            Wrong::OtherBackend => put(file(PAGES.len() - 1 - backend), at, bytes),
            Wrong::OneByteLess => put(file(backend), at, &bytes[..bytes.len() - 1]),
            Wrong::OtherBytes => {
                let moved: Vec<u8> = bytes.iter().map(|byte| byte.wrapping_add(1)).collect();
                put(file(backend), at, &moved);
            }
            Wrong::NothingPlaced => {}
            _ => put(file(backend), at, bytes),
        }
    }
}

/// Writes at a byte of a file, over the ends of pages.
fn put(file: &Mapping, mut at: usize, mut bytes: &[u8]) {
    while !bytes.is_empty() {
        let (page, offset) = (at / PAGE_SIZE, at % PAGE_SIZE);
        let (now, rest) = bytes.split_at(bytes.len().min(PAGE_SIZE - offset));
        file.write(page as u64, offset, now);
        (at, bytes) = (at + now.len(), rest);
    }
}

/// Names of the corpus' entries by which the mistake shows.
fn shown_by(wrong: Wrong) -> Vec<String> {
    let mut names = Vec::new();
    for entry in std::fs::read_dir(corpus("frame")).unwrap() {
        let entry = entry.unwrap();
        let data = std::fs::read(entry.path()).unwrap();
        let mutant = |inbound| Mutant { inbound, rules: Reference::new(), wrong };
        if look(&data, mutant).is_err() {
            names.push(entry.file_name().to_string_lossy().into_owned());
        }
    }
    names
}

#[test]
fn every_wrong_receiver_is_told_from_the_real_one() {
    assert_eq!(shown_by(Wrong::Nothing), [""; 0], "what is right was taken for wrong");
    for wrong in ALL {
        assert!(!shown_by(wrong).is_empty(), "no input of the corpus shows {wrong:?}");
    }
}
