//! Choices that a seed replays (SplitMix64).

/// A generator of numbers.
#[derive(Debug, Clone)]
pub(super) struct Numbers(u64);

impl Numbers {
    pub(super) fn new(seed: u64) -> Self {
        Self(seed)
    }

    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    /// A number below `bound`; 0 when there is none.
    pub(super) fn below(&mut self, bound: u64) -> u64 {
        // The bias of the remainder is one in billions.
        self.next() % bound.max(1)
    }

    /// Whether one of a share of all is it.
    pub(super) fn is_in(&mut self, share: f64) -> bool {
        // The upper 53 bits are a number from 0 to 1, without 1.
        ((self.next() >> 11) as f64) < share * (1_u64 << 53) as f64
    }

    pub(super) fn shuffle<T>(&mut self, items: &mut [T]) {
        for last in (1..items.len()).rev() {
            items.swap(last, self.below(last as u64 + 1) as usize);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_seed_replays_and_shares_are_kept() {
        let shuffled = |seed| {
            let mut items: Vec<u32> = (0..100).collect();
            Numbers::new(seed).shuffle(&mut items);
            items
        };
        assert_eq!(shuffled(7), shuffled(7));
        assert_ne!(shuffled(7), shuffled(8));
        let mut sorted = shuffled(7);
        sorted.sort_unstable();
        assert!(sorted.into_iter().eq(0..100));
        let mut numbers = Numbers::new(1);
        let chosen = (0..10_000).filter(|_| numbers.is_in(0.05)).count();
        assert!((400..600).contains(&chosen), "{chosen}");
        assert!((0..1000).all(|_| numbers.is_in(1.0)) && !(0..1000).any(|_| numbers.is_in(0.0)));
    }
}
