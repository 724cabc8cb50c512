//! What a wire does to frames, and how that is written down: `loss=1%,reorder=0.5%,delay=2ms`.

use std::str::FromStr;
use std::time::Duration;

use anyhow::{Context, Error, Result, bail, ensure};

/// Frames that a limited rate lets wait when nothing else is said.
const DEFAULT_QUEUE: usize = 100;
/// Mean length of a burst when nothing else is said, frames.
const DEFAULT_BURST_LEN: f64 = 8.0;

/// Losses that come in bursts (Gilbert and Elliott): the wire is good, or it is bad and loses everything.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Burst {
    /// Share of all frames that get lost in bursts, 0 to 1.
    pub share: f64,
    /// Mean length of a burst, frames.
    pub length: f64,
}

/// What happens to the frames of one direction. Shares are of all frames, 0 to 1.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Faults {
    /// Lost, each by itself.
    pub loss: f64,
    /// Lost in bursts.
    pub burst: Option<Burst>,
    /// Overtaken by some that were sent after it.
    pub reorder: f64,
    /// Arriving twice.
    pub duplicate: f64,
    /// Arriving with a bit flipped, in the headers as often as behind them.
    pub corrupt: f64,
    /// Time a frame is on its way.
    pub delay: Duration,
    /// Bytes per second; `None` is unlimited.
    pub rate: Option<u64>,
    /// Frames that may wait for the rate; what does not fit is lost.
    pub queue: usize,
}

impl Default for Faults {
    fn default() -> Self {
        Self {
            loss: 0.0,
            burst: None,
            reorder: 0.0,
            duplicate: 0.0,
            corrupt: 0.0,
            delay: Duration::ZERO,
            rate: None,
            queue: DEFAULT_QUEUE,
        }
    }
}

impl Faults {
    /// A wire on which nothing arrives.
    pub fn cut() -> Self {
        Self { loss: 1.0, ..Self::default() }
    }
}

/// A wire, direction by direction.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct WireConfig {
    /// From host-a to host-b.
    pub a_to_b: Faults,
    /// From host-b to host-a.
    pub b_to_a: Faults,
    /// What the dice begin with.
    pub seed: u64,
}

impl WireConfig {
    /// The same in both directions.
    pub fn both(faults: Faults) -> Self {
        Self { a_to_b: faults, b_to_a: faults, seed: 0 }
    }
}

impl FromStr for WireConfig {
    type Err = Error;

    /// `loss=1%,burst=1%x8,reorder=1%,dup=1%,corrupt=1%,delay=2ms,rate=100,queue=64,seed=7,only=a-b`: rate in MiB/s,
    /// queue in frames; `only` leaves the other direction perfect.
    fn from_str(text: &str) -> Result<Self> {
        let mut faults = Faults::default();
        let (mut seed, mut directions) = (0, [true; 2]);
        for item in text.split(',').filter(|item| !item.is_empty()) {
            let (name, value) =
                item.split_once('=').with_context(|| format!("{item:?} is not NAME=VALUE"))?;
            let told = || format!("{name}={value}");
            match name {
                "loss" => faults.loss = share(value).with_context(told)?,
                "reorder" => faults.reorder = share(value).with_context(told)?,
                "dup" => faults.duplicate = share(value).with_context(told)?,
                "corrupt" => faults.corrupt = share(value).with_context(told)?,
                "burst" => faults.burst = Some(burst(value).with_context(told)?),
                "delay" => faults.delay = duration(value).with_context(told)?,
                "rate" => faults.rate = Some(value.parse::<u64>().with_context(told)? << 20),
                "queue" => faults.queue = value.parse().with_context(told)?,
                "seed" => seed = value.parse().with_context(told)?,
                "only" => {
                    directions = match value {
                        "a-b" => [true, false],
                        "b-a" => [false, true],
                        _ => bail!("{item}: the direction is a-b or b-a"),
                    }
                }
                _ => bail!(
                    "a wire has no {name:?}, only loss, burst, reorder, dup, corrupt, delay, rate, queue, seed, only"
                ),
            }
        }
        let of = |bad: bool| if bad { faults } else { Faults::default() };
        Ok(Self { a_to_b: of(directions[0]), b_to_a: of(directions[1]), seed })
    }
}

/// `1%` or `0.01`.
fn share(text: &str) -> Result<f64> {
    let share = match text.strip_suffix('%') {
        Some(percent) => percent.parse::<f64>()? / 100.0,
        None => text.parse()?,
    };
    ensure!((0.0..=1.0).contains(&share), "a share is between 0 and 100 %");
    Ok(share)
}

/// `1%`, or `1%x20` for bursts of 20 frames in the mean.
fn burst(text: &str) -> Result<Burst> {
    let (part, length) = match text.split_once('x') {
        Some((part, length)) => (part, length.parse()?),
        None => (text, DEFAULT_BURST_LEN),
    };
    let share = share(part)?;
    ensure!(length >= 1.0 && share < 1.0, "a burst has a frame or more, and there are good times too");
    Ok(Burst { share, length })
}

/// `2ms`, `500us`.
fn duration(text: &str) -> Result<Duration> {
    if let Some(ms) = text.strip_suffix("ms") {
        return Ok(Duration::try_from_secs_f64(ms.parse::<f64>()? / 1e3)?);
    }
    let us = text.strip_suffix("us").context("a time has a unit: ms or us")?;
    Ok(Duration::from_micros(us.parse()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn everything_can_be_said() {
        let wire: WireConfig =
            "loss=1%,burst=0.5%x20,reorder=0.02,dup=3%,corrupt=4%,delay=1.5ms,rate=100,queue=64,seed=9"
                .parse()
                .unwrap();
        let faults = Faults {
            loss: 0.01,
            burst: Some(Burst { share: 0.005, length: 20.0 }),
            reorder: 0.02,
            duplicate: 0.03,
            corrupt: 0.04,
            delay: Duration::from_micros(1500),
            rate: Some(100 << 20),
            queue: 64,
        };
        assert_eq!(wire, WireConfig { seed: 9, ..WireConfig::both(faults) });
        assert_eq!("".parse::<WireConfig>().unwrap(), WireConfig::default());
    }

    #[test]
    fn one_direction_can_be_left_alone() {
        let wire: WireConfig = "only=b-a,loss=100%".parse().unwrap();
        assert_eq!((wire.a_to_b, wire.b_to_a.loss), (Faults::default(), 1.0));
    }

    #[test]
    fn nonsense_is_refused() {
        for text in ["loss", "loss=101%", "loss=-1", "noise=1%", "delay=3", "only=c", "burst=1%x0", "rate=x"]
        {
            assert!(text.parse::<WireConfig>().is_err(), "{text}");
        }
    }
}
