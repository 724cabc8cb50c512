//! Whether the pages of a migration are sent from where they lie.

use std::{sync::Arc, time::Instant};

use super::{OutgoingHost, memory::GuestMemory};
use crate::{
    agent::{
        config::SendingChoice,
        link::{NotDirect, Outlet},
        ram::RamFiles,
    },
    control::Prepared,
    datapath::{FrameLayout, LaidOut},
    memory::{Mapping, existing_pages},
    xsk::Binding,
};

/// What it takes on the side of the guest's memory.
pub(super) struct DirectSource {
    choice: SendingChoice,
    files: Arc<RamFiles>,
}

impl DirectSource {
    pub fn new(choice: SendingChoice, memory: &GuestMemory) -> Self {
        Self { choice, files: Arc::clone(&memory.writable) }
    }

    /// Whether to try.
    fn wanted(&self, binding: Binding) -> bool {
        match self.choice {
            SendingChoice::Direct => true,
            SendingChoice::Staged => false,
            // Where the kernel copies anyway, there is one copy less of four, for all RAM being pinned.
            SendingChoice::Auto => binding.zero_copy && binding.multi_buffer,
        }
    }
}

impl OutgoingHost {
    /// Replaces the leased queues by one of the migration's own with the guest's RAM in its UMEM, where that is wanted and can
    /// be had. The report says so, or why not.
    pub(super) fn take_direct(&mut self, prepared: &Prepared, mtu: usize, frames: &FrameLayout) {
        if !self.direct.wanted(self.port.binding()) {
            return;
        }
        let begun = Instant::now();
        match tokio::task::block_in_place(|| self.direct_outlet(prepared, mtu, frames)) {
            Ok(outlet) => {
                self.outlets = vec![outlet];
                let pinning = begun.elapsed().as_secs_f64() * 1e3;
                self.record.update(|report| {
                    report.transport.mode = "af-xdp direct".into();
                    report.transport.lanes = 1;
                    report.pinning = pinning;
                });
            }
            Err(reason) if self.direct.choice == SendingChoice::Direct => {
                let note = format!("pages are staged and not sent directly: {reason}");
                self.record.update(|report| report.notes.push(note));
            }
            Err(reason) => tracing::info!(%reason, "pages are staged and not sent directly"),
        }
    }

    fn direct_outlet(
        &self,
        prepared: &Prepared,
        mtu: usize,
        frames: &FrameLayout,
    ) -> Result<Outlet, NotDirect> {
        if prepared.cipher.is_some() {
            return Err(NotDirect::Encrypted);
        }
        if prepared.single_buffer {
            return Err(NotDirect::SingleBuffer("the destination's NIC".into()));
        }
        if !self.port.binding().multi_buffer {
            return Err(NotDirect::SingleBuffer(self.nic.name.clone()));
        }
        if frames.frames_per_page > 1 {
            return Err(NotDirect::SmallMtu(mtu));
        }
        if self.mappings.iter().any(Mapping::is_huge) {
            return Err(NotDirect::Huge);
        }
        let pages = LaidOut::of(&existing_pages(&self.layout, &self.mappings)?, &self.layout);
        if pages.pages() == 0 {
            return Err(NotDirect::Sparse);
        }
        self.port.direct(frames, pages, &self.direct.files.descriptors())
    }
}
