//! The last bytes of a stream.

/// Maximum number of bytes that are kept of each stream.
pub const KEPT: usize = 64 * 1024;

/// The last [`KEPT`] bytes of a stream. Uses at most twice as much memory.
#[derive(Debug, Default)]
pub(super) struct LastBytes(Vec<u8>);

impl LastBytes {
    pub(super) fn push(&mut self, bytes: &[u8]) {
        let bytes = &bytes[bytes.len().saturating_sub(KEPT)..];
        if self.0.len() + bytes.len() > 2 * KEPT {
            let kept = KEPT - bytes.len();
            self.0.drain(..self.0.len() - kept);
        }
        self.0.extend_from_slice(bytes);
    }

    pub(super) fn get(&self) -> &[u8] {
        &self.0[self.0.len().saturating_sub(KEPT)..]
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn the_last_bytes_are_kept_in_bounded_memory(sizes in proptest::collection::vec(0usize..3 * KEPT, 0..12)) {
            let (mut last, mut all, mut next) = (LastBytes::default(), Vec::new(), 0u8);
            for size in sizes {
                let bytes: Vec<u8> = (0..size).map(|_| { next = next.wrapping_add(7); next }).collect();
                last.push(&bytes);
                all.extend_from_slice(&bytes);
                prop_assert!(last.0.len() <= 2 * KEPT);
                prop_assert!(last.get() == &all[all.len().saturating_sub(KEPT)..]);
            }
        }
    }
}
