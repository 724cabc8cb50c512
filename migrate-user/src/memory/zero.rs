//! Which pages are zero.

/// Bytes looked at before the rest: most pages that are not zero show it here.
const HEAD: usize = 64;
/// Bytes between two looks at whether all was zero so far: enough for the compiler's vectors, few enough to leave early.
const BLOCK: usize = 512;

/// Whether all bytes are zero. Leaves early where they are not. Plain loops over words, which the compiler turns into vector
/// instructions of whatever processor it builds for (`benches/pages.rs` measures it).
pub fn is_zero(page: &[u8]) -> bool {
    let (head, rest) = page.split_at(page.len().min(HEAD));
    let (blocks, tail) = rest.as_chunks::<BLOCK>();
    !any(head) && blocks.iter().all(|block| !any_of_block(block)) && !any(tail)
}

fn any_of_block(block: &[u8; BLOCK]) -> bool {
    let (words, _) = block.as_chunks::<8>();
    words.iter().fold(0, |any, word| any | u64::from_ne_bytes(*word)) != 0
}

fn any(bytes: &[u8]) -> bool {
    bytes.iter().fold(0, |any, byte| any | byte) != 0
}

#[cfg(test)]
mod tests {
    use super::is_zero;

    #[test]
    fn one_bit_anywhere_is_not_zero() {
        let mut page = [0u8; 4096];
        assert!(is_zero(&page) && is_zero(&page[..5]) && is_zero(&[]));
        for at in 0..page.len() {
            page[at] = 0x10;
            assert!(!is_zero(&page), "{at}");
            page[at] = 0;
        }
    }
}
