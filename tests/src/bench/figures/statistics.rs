//! What is made of many runs.

/// The middle value; of an even number the upper one of the two. NaN without values.
pub(crate) fn median(values: impl IntoIterator<Item = f64>) -> f64 {
    let values = sorted(values);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}

/// The smallest value that `percent` per cent of the values do not exceed (nearest rank), 0 < `percent` ≤ 100. NaN
/// without values.
pub(in crate::bench) fn percentile(values: impl IntoIterator<Item = f64>, percent: f64) -> f64 {
    let values = sorted(values);
    let rank = (values.len() as f64 * percent / 100.0).ceil() as usize;
    values.get(rank.saturating_sub(1)).copied().unwrap_or(f64::NAN)
}

fn sorted(values: impl IntoIterator<Item = f64>) -> Vec<f64> {
    let mut values: Vec<f64> = values.into_iter().collect();
    values.sort_by(f64::total_cmp);
    values
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_middle_one_counts() {
        assert!((median([9.0, 1.0, 5.0]) - 5.0).abs() < f64::EPSILON);
        assert!((median([4.0, 1.0]) - 4.0).abs() < f64::EPSILON);
        assert!(median([]).is_nan());
    }

    #[test]
    fn the_99th_of_100_leaves_one_above() {
        let values = || (1..=100).map(f64::from);
        assert!((percentile(values(), 99.0) - 99.0).abs() < f64::EPSILON);
        assert!((percentile((1..=200).map(f64::from), 99.0) - 198.0).abs() < f64::EPSILON);
        assert!((percentile([7.0], 99.0) - 7.0).abs() < f64::EPSILON);
        assert!((percentile(values(), 100.0) - 100.0).abs() < f64::EPSILON);
        assert!(percentile([], 99.0).is_nan());
    }
}
