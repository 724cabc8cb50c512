//! Copies that leave no trace in the cache.

/// A cache line, bytes.
const LINE: usize = 64;

/// Copies `pieces`, one behind the other, to where nobody looks for them soon, as a guest's memory on its way is: past the cache, without
/// first reading what they overwrite. Twice as fast as `memcpy` (docs/performance.md, "Copying"). Others are sure to see the bytes only
/// after a [`fence`].
///
/// Whole lines only: those in which one piece ends and the next begins are put together first. A part of a line would have to be written
/// into the cache, for which the line is fetched from memory, and everything behind waits. The loop is as it is because a straighter one,
/// without the loop within, received a fifth less at MTU 65535.
///
/// # Safety
/// `to` is valid for `len` bytes, and no piece overlaps them.
///
/// # Panics
/// When the pieces are more than `len` bytes.
pub(super) unsafe fn past_the_cache<'a>(
    pieces: impl Iterator<Item = &'a [u8]>,
    mut to: *mut u8,
    mut len: usize,
) {
    let mut line = Line([0; LINE]);
    // Bytes of the line at `to` that are in `line` and not yet there.
    let mut held = 0;
    for mut piece in pieces {
        assert!(piece.len() + held <= len, "{} bytes, and room for {len}", piece.len() + held);
        // Where the first piece begins within a line, and where the last one ended.
        while !piece.is_empty() && (held > 0 || to.align_offset(LINE) > 0) {
            let room = if held > 0 { LINE - held } else { to.align_offset(LINE) };
            let (now, rest) = piece.split_at(room.min(piece.len()));
            piece = rest;
            if held == 0 {
                // SAFETY: within `len`, by the assertion.
                unsafe { write(now, &mut to, &mut len) };
                continue;
            }
            line.0[held..held + now.len()].copy_from_slice(now);
            held += now.len();
            if held == LINE {
                held = 0;
                // SAFETY: a whole line within `len`; `to` is aligned, or nothing would have been held.
                unsafe { stream(&line.0, &mut to, &mut len) };
            }
        }
        let (lines, rest) = piece.split_at(piece.len() / LINE * LINE);
        if !piece.is_empty() {
            // SAFETY: as above.
            unsafe { stream(lines, &mut to, &mut len) };
            line.0[..rest.len()].copy_from_slice(rest);
            held = rest.len();
        }
    }
    // SAFETY: within `len`, by the assertion of the piece that was held.
    unsafe { write(&line.0[..held], &mut to, &mut len) };
}

/// A line of its own, so that it is read as one.
#[repr(align(64))]
struct Line([u8; LINE]);

/// Writes bytes to `to` as any others, and moves it behind them.
///
/// # Safety
/// `to` is valid for `len`, which is not less than there are bytes.
unsafe fn write(bytes: &[u8], to: &mut *mut u8, len: &mut usize) {
    debug_assert!(bytes.len() <= *len);
    // SAFETY: as promised by the caller.
    unsafe {
        std::ptr::copy_nonoverlapping(bytes.as_ptr(), *to, bytes.len());
        *to = to.add(bytes.len());
    }
    *len -= bytes.len();
}

/// The same for whole lines, by non-temporal stores of SSE2, which every x86-64 has; wider ones are no faster.
///
/// # Safety
/// As [`write`], and `to` is aligned to a line.
#[cfg(target_arch = "x86_64")]
unsafe fn stream(lines: &[u8], to: &mut *mut u8, len: &mut usize) {
    use std::arch::x86_64::{__m128i, _mm_loadu_si128, _mm_stream_si128};
    debug_assert!(lines.len().is_multiple_of(LINE) && lines.len() <= *len);
    for line in lines.as_chunks::<LINE>().0 {
        let (from, at): (*const __m128i, *mut __m128i) = (line.as_ptr().cast(), to.cast());
        // SAFETY: a line each, as promised. Four stores fill it, so that it leaves whole.
        unsafe {
            let parts = [0, 1, 2, 3].map(|part| _mm_loadu_si128(from.add(part)));
            for (index, part) in parts.into_iter().enumerate() {
                _mm_stream_si128(at.add(index), part);
            }
            *to = to.add(LINE);
        }
    }
    *len -= lines.len();
}

#[cfg(not(target_arch = "x86_64"))]
use write as stream;

/// Whoever is told by this thread, after this, of what it has copied [past the cache](past_the_cache), sees it: such copies are not ordered
/// with other writes. Waits until they have left the processor, so that one for many copies costs least.
pub fn fence() {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: of SSE, as the stores are; it has no other effect.
    unsafe {
        std::arch::x86_64::_mm_sfence();
    }
}

#[cfg(test)]
mod tests {
    use super::{fence, past_the_cache};

    #[test]
    fn every_byte_arrives_and_no_other_changes_in_any_pieces() {
        let from: Vec<u8> = (0..9000).map(|at| (at * at / 13) as u8).collect();
        for len in [0, 1, 63, 64, 65, 127, 128, 129, 1024, 4096, 8192] {
            for target in [0, 1, 16, 63, 64, 99] {
                for piece in [1, 5, 64, 100, 622, 3840, 9000] {
                    let mut to = vec![0xa5; 9000];
                    let pieces = from[7..7 + len].chunks(piece);
                    // SAFETY: the vector is longer than offset and length together.
                    unsafe { past_the_cache(pieces, to.as_mut_ptr().add(target), len) };
                    fence();
                    assert_eq!(to[target..target + len], from[7..7 + len], "{len}, {target}, {piece}");
                    assert!(to[..target].iter().chain(&to[target + len..]).all(|&byte| byte == 0xa5));
                }
            }
        }
    }

    #[test]
    #[should_panic(expected = "bytes, and room for")]
    fn more_than_there_is_room_for_is_refused() {
        let mut to = [0u8; 128];
        let pieces = [[1u8; 40].as_slice(), &[1; 40]];
        // SAFETY: twice as much room as is said.
        unsafe { past_the_cache(pieces.into_iter(), to.as_mut_ptr(), 64) };
    }
}
