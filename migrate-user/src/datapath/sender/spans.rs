//! Which pages each frame of a round carried, in about a byte a frame.

/// Steps and lengths up to this are written as four bits each.
const SHORT: u64 = 14;
/// A span that does not fit so: the step (8 bytes, wrapping) and the length (8 bytes) follow.
const LONG: u8 = 0xff;

/// For each frame, in order, the first and the last page that it carried. Pages mostly follow each other from frame to frame, so
/// that only the differences are kept: what is asked for is asked in order.
#[derive(Debug, Default)]
pub(super) struct Spans {
    bytes: Vec<u8>,
    /// First page of the last frame written, from which steps count.
    before: u64,
    /// The frame that may yet grow.
    open: Option<(u64, u64)>,
}

impl Spans {
    /// A frame begins with `page`.
    pub(super) fn begin(&mut self, page: u64) {
        self.write();
        self.open = Some((page, page));
    }

    /// The frame carries `page` too, which is the highest so far.
    pub(super) fn extend(&mut self, page: u64) {
        if let Some((_, last)) = &mut self.open {
            *last = page;
        }
    }

    fn write(&mut self) {
        let Some((first, last)) = self.open.take() else { return };
        let (step, length) = (first.wrapping_sub(self.before), last.wrapping_sub(first));
        if step <= SHORT && length <= SHORT {
            self.bytes.push((step << 4 | length) as u8);
        } else {
            self.bytes.push(LONG);
            self.bytes.extend(step.to_le_bytes());
            self.bytes.extend(length.to_le_bytes());
        }
        self.before = first;
    }

    /// The frames' first and last pages, in order.
    pub(super) fn iter(&self) -> impl Iterator<Item = (u64, u64)> + '_ {
        let (mut bytes, mut before) = (self.bytes.as_slice(), 0_u64);
        let written = std::iter::from_fn(move || {
            let (&head, rest) = bytes.split_first()?;
            let (step, length) = if head == LONG {
                let (step, rest) = rest.split_first_chunk()?;
                let (length, rest) = rest.split_first_chunk()?;
                bytes = rest;
                (u64::from_le_bytes(*step), u64::from_le_bytes(*length))
            } else {
                bytes = rest;
                (u64::from(head >> 4), u64::from(head & 0xf))
            };
            let first = before.wrapping_add(step);
            before = first;
            Some((first, first.wrapping_add(length)))
        });
        written.chain(self.open)
    }

    /// Memory it takes, bytes.
    #[cfg(test)]
    fn size(&self) -> usize {
        self.bytes.len()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn comes_out_as_it_went_in(frames in proptest::collection::vec(
            (prop_oneof![0..50_u64, any::<u64>()], prop_oneof![0..20_u64, 0..1_u64 << 40]), 0..100))
        {
            let frames: Vec<(u64, u64)> =
                frames.into_iter().map(|(first, length)| (first, first.saturating_add(length))).collect();
            let mut spans = Spans::default();
            for &(first, last) in &frames {
                spans.begin(first);
                spans.extend(last);
            }
            prop_assert!(spans.iter().eq(frames));
        }
    }

    #[test]
    fn a_frame_takes_a_byte() {
        let mut spans = Spans::default();
        for frame in 0..1000 {
            spans.begin(1_000_000 + 2 * frame);
            spans.extend(1_000_001 + 2 * frame);
        }
        assert!(spans.size() < 1100, "{}", spans.size());
    }
}
