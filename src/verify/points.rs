//! Which states are restored. Pure.

use super::lines::Range;
use super::random::Numbers;

/// Transactions of a line, oldest first, to restore besides its newest state: the oldest one that can be, and others that are
/// spread over all of them, one at random in each part.
pub(super) fn choose(ranges: &[Range], newest_txid: Option<u64>, points: u32, numbers: &mut Numbers) -> Vec<u64> {
    let Some(oldest) = ranges.first().filter(|_| points >= 2) else { return Vec::new() };
    let mut chosen = vec![oldest.first_txid];
    let states: u64 = ranges.iter().map(|range| range.last_txid - range.first_txid + 1).sum();
    // Those in between: the oldest and the newest one are chosen already.
    let is_newest_among = newest_txid.is_some() && ranges.last().map(|range| range.last_txid) == newest_txid;
    let between = states.saturating_sub(1 + u64::from(is_newest_among));
    let parts = u64::from(points - 2).min(between);
    for part in 0..parts {
        let (start, end) = (between * part / parts, between * (part + 1) / parts);
        chosen.extend(state_at(ranges, 1 + start + numbers.below(end - start)));
    }
    chosen.retain(|txid| Some(*txid) != newest_txid);
    chosen
}

/// State number `index` of all.
fn state_at(ranges: &[Range], mut index: u64) -> Option<u64> {
    for range in ranges {
        let count = range.last_txid - range.first_txid + 1;
        if index < count {
            return Some(range.first_txid + index);
        }
        index -= count;
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn points_are_spread_and_can_be_restored() {
        let ranges = [Range { first_txid: 10, last_txid: 19 }, Range { first_txid: 100, last_txid: 189 }];
        let is_there = |txid: &u64| ranges.iter().any(|range| (range.first_txid..=range.last_txid).contains(txid));
        for seed in 0..50 {
            let mut numbers = Numbers::new(seed);
            assert!(choose(&ranges, Some(189), 1, &mut numbers).is_empty());
            assert_eq!(choose(&ranges, Some(189), 2, &mut numbers), [10]);
            let twelve = choose(&ranges, Some(189), 12, &mut numbers);
            assert!(twelve.len() == 11 && twelve.iter().all(is_there), "{twelve:?}");
            assert!(twelve.is_sorted_by(|before, after| before < after) && !twelve.contains(&189), "{twelve:?}");
            // One in each tenth.
            assert!(twelve.iter().filter(|txid| **txid >= 145).count() >= 3, "{twelve:?}");
            let all = choose(&ranges, None, 1000, &mut numbers);
            assert_eq!(all.len(), 100);
        }
        assert!(choose(&[], None, 5, &mut Numbers::new(1)).is_empty());
    }
}
