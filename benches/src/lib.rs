//! Percentiles of samples, as the benches print them.

use std::time::Duration;

/// Prints one line: name, number of samples, median, 90th and 99th percentile, extremes.
///
/// # Panics
///
/// Without samples.
pub fn print_percentiles(name: &str, mut samples: Vec<Duration>) {
    assert!(!samples.is_empty(), "{name} has no samples");
    samples.sort_unstable();
    let at = |percent: usize| samples[(samples.len() - 1) * percent / 100];
    println!(
        "{name:<58} n={:<5} p50={:>9.1?} p90={:>9.1?} p99={:>9.1?} min={:>9.1?} max={:>9.1?}",
        samples.len(),
        at(50),
        at(90),
        at(99),
        at(0),
        at(100)
    );
}
