//! How pages are cut into frames.

use migrate_common::{
    PAGE_SIZE,
    locate::{ETHERNET_LEN, IPV4_LEN, IPV6_LEN, UDP_LEN},
    wire::{DESCRIPTOR_LEN, HEADER_LEN, TAG_LEN},
};

/// Smallest MTU that the page stream uses: IPv4 networks carry 1500 everywhere, and below 576 nothing is sure.
const MIN_MTU: usize = 576;

/// Buffers of one frame at most, on the receiving side: `MAX_SKB_FRAGS` + 1, `include/linux/skbuff.h`.
const MAX_BUFFERS: usize = 18;
/// Bytes of a frame that one receive buffer holds: a chunk less the kernel's 256 bytes of headroom.
const RECEIVE_BUFFER: usize = 4096 - 256;

/// Frame sizes that cannot be.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum LayoutError {
    /// MTU below the least that is supported.
    #[error("an MTU of {0} bytes is too small for the page stream: at least {MIN_MTU} is needed")]
    MtuTooSmall(usize),
}

/// What one frame carries.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FrameLayout {
    /// Whole pages a frame carries; 0 when a page takes several frames.
    pub pages_per_frame: usize,
    /// Frames a page takes; 1 when it fits.
    pub frames_per_page: usize,
    /// Bytes of a page in one frame: the whole page, or the largest fragment.
    pub fragment: usize,
    /// Headers of link, network and transport before ours, bytes.
    pub prefix: usize,
    /// Longest frame, Ethernet header included, bytes.
    pub frame_len: usize,
    /// Zero runs one frame carries at most.
    pub zero_runs: usize,
}

impl FrameLayout {
    /// The layout for an IP MTU in bytes. `single_buffer` says that one side takes only frames of one buffer.
    ///
    /// # Errors
    /// [`LayoutError::MtuTooSmall`].
    pub fn new(mtu: usize, ipv6: bool, single_buffer: bool) -> Result<Self, LayoutError> {
        if mtu < MIN_MTU {
            return Err(LayoutError::MtuTooSmall(mtu));
        }
        let ip = if ipv6 { IPV6_LEN } else { IPV4_LEN };
        let prefix = ETHERNET_LEN + ip + UDP_LEN;
        let buffers = if single_buffer { 1 } else { MAX_BUFFERS };
        // IPv4's total length is 16 bits, whatever the interface would take.
        let longest = (ETHERNET_LEN + mtu.min(65535)).min(buffers * RECEIVE_BUFFER);
        // A sealed frame's tag has its place in any case: the layout does not depend on the guard.
        let room = longest - prefix - HEADER_LEN - TAG_LEN;
        let pages_per_frame = room / (PAGE_SIZE + DESCRIPTOR_LEN);
        let (frames_per_page, fragment) = if pages_per_frame > 0 {
            (1, PAGE_SIZE)
        } else {
            // Multiples of 8 keep both sides' copies aligned.
            let most = (room - DESCRIPTOR_LEN) & !7;
            let frames = PAGE_SIZE.div_ceil(most);
            (frames, PAGE_SIZE.div_ceil(frames).next_multiple_of(8))
        };
        let carried = pages_per_frame.max(1);
        Ok(Self {
            pages_per_frame,
            frames_per_page,
            fragment,
            prefix,
            frame_len: prefix + HEADER_LEN + carried * (DESCRIPTOR_LEN + fragment) + TAG_LEN,
            zero_runs: (carried * (DESCRIPTOR_LEN + fragment) / DESCRIPTOR_LEN).min(64),
        })
    }

    /// Bytes of descriptors and payload in a full frame.
    pub fn body_room(&self) -> usize {
        self.frame_len - self.prefix - HEADER_LEN - TAG_LEN
    }

    /// Receive buffers one full frame takes.
    pub fn receive_buffers(&self) -> usize {
        self.frame_len.div_ceil(RECEIVE_BUFFER)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn layout(mtu: usize) -> FrameLayout {
        FrameLayout::new(mtu, false, false).unwrap()
    }

    #[test]
    fn the_usual_networks() {
        assert_eq!((layout(9000).pages_per_frame, layout(9000).frames_per_page), (2, 1));
        assert_eq!((layout(65535).pages_per_frame, layout(65535).frames_per_page), (15, 1));
        assert_eq!(
            (layout(1500).pages_per_frame, layout(1500).frames_per_page, layout(1500).fragment),
            (0, 3, 1368)
        );
        assert_eq!((layout(3046).frames_per_page, layout(3046).fragment), (2, 2048));
        assert_eq!(FrameLayout::new(9000, false, true).unwrap().frames_per_page, 2);
        assert_eq!(FrameLayout::new(500, false, false), Err(LayoutError::MtuTooSmall(500)));
    }

    proptest! {
        #[test]
        fn frames_fit_and_fragments_cover_the_page(mtu in 576usize..=70_000, ipv6: bool, single: bool) {
            let layout = FrameLayout::new(mtu, ipv6, single).unwrap();
            prop_assert!(layout.frame_len <= ETHERNET_LEN + mtu);
            prop_assert!(layout.frames_per_page * layout.fragment >= PAGE_SIZE);
            prop_assert!((layout.frames_per_page - 1) * layout.fragment < PAGE_SIZE);
            let most = if single { 1 } else { MAX_BUFFERS };
            prop_assert!(layout.receive_buffers() <= most);
            prop_assert!(layout.zero_runs >= 1);
        }
    }
}
