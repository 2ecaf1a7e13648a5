//! Whether a series of samples grows: a slope that outliers do not move, and a verdict.
//!
//! What is asked is not "is it constant" but "does its floor rise": under load, tasks and memory swing with
//! what is in hand, and a leak is what is still there when they swing back. So the time is cut into windows,
//! the lowest sample of each is taken, and the slope is the median of all slopes between two of those
//! (Theil–Sen): almost a third of the windows may be off without moving it.

/// Windows that a series is cut into.
const WINDOWS: usize = 10;

/// One sample: seconds since the start, and the value.
pub(crate) type Sample = (f64, f64);

/// The lowest sample of each window, at its own time.
fn floors(samples: &[Sample]) -> Vec<Sample> {
    let (Some(first), Some(last)) = (samples.first(), samples.last()) else { return Vec::new() };
    let width = (last.0 - first.0) / WINDOWS as f64;
    let window = |sample: &Sample| (((sample.0 - first.0) / width) as usize).min(WINDOWS - 1);
    let lowest = |n| samples.iter().filter(move |s| window(s) == n).min_by(|a, b| a.1.total_cmp(&b.1));
    (0..WINDOWS).filter_map(lowest).copied().collect()
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    let middle = values.len() / 2;
    match values.len() {
        0 => 0.0,
        n if n % 2 == 1 => values[middle],
        _ => (values[middle - 1] + values[middle]) / 2.0,
    }
}

/// Units per second by which the floor rises.
pub(crate) fn slope(samples: &[Sample]) -> f64 {
    let floors = floors(samples);
    let after = |(n, a): (usize, &Sample)| {
        let a = *a;
        floors[n + 1..].iter().map(move |b| (b.1 - a.1) / (b.0 - a.0)).collect::<Vec<_>>()
    };
    median(floors.iter().enumerate().flat_map(after).collect())
}

/// How much a series has grown.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Growth {
    pub mean: f64,
    pub per_hour: f64,
    /// Over the time that was sampled.
    pub total: f64,
}

pub(crate) fn growth(samples: &[Sample]) -> Growth {
    let (Some(first), Some(last)) = (samples.first(), samples.last()) else {
        return Growth { mean: 0.0, per_hour: 0.0, total: 0.0 };
    };
    let slope = slope(samples);
    Growth {
        mean: samples.iter().map(|s| s.1).sum::<f64>() / samples.len() as f64,
        per_hour: slope * 3_600.0,
        total: slope * (last.0 - first.0),
    }
}

/// What may pass for flat.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Flat {
    /// Growth over the sampled time that noise can bring about, in units.
    pub noise: f64,
    /// Growth per hour, as a share of the mean.
    pub share_per_hour: f64,
}

impl Flat {
    /// A leak is growth beyond the noise *and* faster than the share: in a short run the noise decides, in a
    /// long one, where the noise is little per hour, the share does.
    pub(crate) fn check(self, what: &str, samples: &[Sample]) -> Result<Growth, String> {
        let growth = growth(samples);
        if samples.len() < WINDOWS {
            return Err(format!("{what}: {} samples prove nothing", samples.len()));
        }
        if growth.total > self.noise && growth.per_hour > self.share_per_hour * growth.mean {
            return Err(format!(
                "{what} grows: by {:.1} while sampled (noise: {:.1}), {:.1} per hour (allowed: {:.1}), mean {:.1}",
                growth.total,
                self.noise,
                growth.per_hour,
                self.share_per_hour * growth.mean,
                growth.mean
            ));
        }
        Ok(growth)
    }
}

mod tests {
    use super::*;
    use crate::{COUNT, RSS};

    /// A sample each two seconds: `base`, `per_hour` more each hour, and noise of up to `swing` above.
    fn series(seconds: u32, base: f64, per_hour: f64, swing: f64) -> Vec<Sample> {
        let mut rng = fastrand::Rng::with_seed(7);
        let value = |t: f64, noise: f64| base + per_hour * t / 3_600.0 + noise * swing;
        (0..seconds / 2).map(|n| f64::from(n) * 2.0).map(|t| (t, value(t, rng.f64()))).collect()
    }

    #[test]
    fn the_slope_is_that_of_the_floor() {
        let found = slope(&series(900, 100.0, 3_600.0, 0.0));
        assert!((found - 1.0).abs() < 1e-9, "{found}");
        let found = slope(&series(900, 100.0, 3_600.0, 50.0));
        assert!((found - 1.0).abs() < 0.1, "{found}");
    }

    #[test]
    fn a_few_outliers_do_not_move_the_slope() {
        let mut samples = series(900, 100.0, 0.0, 0.0);
        samples.iter_mut().rev().take(90).for_each(|sample| sample.1 = 5_000.0);
        assert_eq!(slope(&samples), 0.0);
    }

    #[test]
    fn steady_series_are_flat() {
        RSS.check("memory", &series(900, 90e6, 0.0, 20e6)).unwrap();
        COUNT.check("tasks", &series(900, 180.0, 0.0, 150.0)).unwrap();
        COUNT.check("consumers", &series(120, 48.0, 0.0, 3.0)).unwrap();
        COUNT.check("nothing", &series(120, 0.0, 0.0, 0.0)).unwrap();
    }

    /// 100 bytes lost with each of 500 requests a second at a node, over half an hour.
    #[test]
    fn a_small_leak_of_memory_is_noticed() {
        let leaking = series(1_800, 90e6, 100.0 * 500.0 * 3_600.0, 20e6);
        let error = RSS.check("memory", &leaking).unwrap_err();
        assert!(error.starts_with("memory grows"), "{error}");
    }

    /// One consumer, task or descriptor lost with each move of a shard, every 5 s, over two minutes.
    #[test]
    fn one_thing_lost_per_move_is_noticed() {
        assert!(COUNT.check("consumers", &series(120, 48.0, 720.0, 3.0)).is_err());
        assert!(COUNT.check("tasks", &series(120, 180.0, 720.0, 20.0)).is_err());
    }

    #[test]
    fn too_few_samples_are_no_proof() {
        assert!(RSS.check("memory", &series(10, 90e6, 0.0, 0.0)).is_err());
    }
}
