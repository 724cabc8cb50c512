//! Processors: how many there are, and lists of them in the kernel's own words: `2-5,8`.

use std::{collections::BTreeSet, fmt, str::FromStr};

use rustix::thread::CpuSet;
use serde::Deserialize;

/// How many processors the calling thread may use; 1 where that cannot be told.
pub fn usable() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}

/// A set of processors that is not empty.
///
/// Read and written as the kernel does (`bitmap_parselist`, lib/bitmap-str.c): numbers and ranges with commas between them,
/// and of a range by groups, `0-31:2/8`, the first two of each eight.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(try_from = "String")]
pub struct CpuList(BTreeSet<usize>);

/// Why a text is no list of processors.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum CpuListError {
    /// There is nothing in it.
    #[error("names no processor: give some, as in \"2-5,8\"")]
    Empty,
    /// A part that is neither number nor range.
    #[error("{part:?} is neither a processor's number nor a range of them: write a list like \"2-5,8\"")]
    Part {
        /// The part.
        part: String,
    },
    /// A range that ends before it begins.
    #[error("the range {part:?} goes backwards: write the lower number first")]
    Backwards {
        /// The part.
        part: String,
    },
    /// A number that a set of processors has no place for.
    #[error("there can be no processor {number} in {part:?}: numbers end at {}", CpuSet::MAX_CPU - 1)]
    TooHigh {
        /// The number.
        number: usize,
        /// The part.
        part: String,
    },
}

impl CpuList {
    /// How many there are, at least one.
    pub fn count(&self) -> usize {
        self.0.len()
    }

    /// Those of them that are not in `others`.
    pub fn without(&self, others: &Self) -> Option<Self> {
        Self::of(self.0.difference(&others.0).copied())
    }

    fn of(cpus: impl Iterator<Item = usize>) -> Option<Self> {
        let cpus: BTreeSet<usize> = cpus.collect();
        (!cpus.is_empty()).then_some(Self(cpus))
    }
}

impl From<&CpuList> for CpuSet {
    fn from(list: &CpuList) -> Self {
        let mut set = Self::new();
        list.0.iter().for_each(|&cpu| set.set(cpu));
        set
    }
}

impl FromStr for CpuList {
    type Err = CpuListError;

    fn from_str(text: &str) -> Result<Self, CpuListError> {
        let mut cpus = BTreeSet::new();
        // The kernel ends its lists with a line feed, and so they are read from its files.
        for part in text.trim().split(',').map(str::trim).filter(|part| !part.is_empty()) {
            cpus.extend(parse_part(part)?);
        }
        Self::of(cpus.into_iter()).ok_or(CpuListError::Empty)
    }
}

/// A number, `FIRST-LAST`, or `FIRST-LAST:USED/GROUP`.
fn parse_part(part: &str) -> Result<impl Iterator<Item = usize> + use<>, CpuListError> {
    let wrong = || CpuListError::Part { part: part.to_owned() };
    // `parse` also takes a plus sign, which the kernel does not.
    let number = |text: &str| {
        let digits = !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
        digits.then(|| text.parse::<usize>().ok()).flatten().ok_or_else(wrong)
    };
    let (range, pattern) = part.split_once(':').map_or((part, None), |(range, groups)| (range, Some(groups)));
    let (first, last) = match range.split_once('-') {
        Some((first, last)) => (number(first)?, number(last)?),
        // Groups are of ranges only.
        None if pattern.is_some() => return Err(wrong()),
        None => (number(range)?, number(range)?),
    };
    let (used, group) = match pattern.map(|pattern| pattern.split_once('/')) {
        Some(Some((used, group))) => (number(used)?, number(group)?),
        Some(None) => return Err(wrong()),
        None => (1, 1),
    };
    if used == 0 || used > group {
        return Err(wrong());
    }
    if first > last {
        return Err(CpuListError::Backwards { part: part.to_owned() });
    }
    if last >= CpuSet::MAX_CPU {
        return Err(CpuListError::TooHigh { number: last, part: part.to_owned() });
    }
    Ok((first..=last).filter(move |cpu| (cpu - first) % group < used))
}

impl TryFrom<String> for CpuList {
    type Error = CpuListError;

    fn try_from(text: String) -> Result<Self, CpuListError> {
        text.parse()
    }
}

impl fmt::Display for CpuList {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut cpus = self.0.iter().copied().peekable();
        let mut comma = "";
        while let Some(first) = cpus.next() {
            let mut last = first;
            while cpus.next_if_eq(&(last + 1)).is_some() {
                last += 1;
            }
            match last - first {
                0 => write!(f, "{comma}{first}")?,
                _ => write!(f, "{comma}{first}-{last}")?,
            }
            comma = ",";
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn list(text: &str) -> CpuList {
        text.parse().unwrap()
    }

    #[test]
    fn lists_are_read_as_the_kernel_writes_them() {
        for (text, canonical) in [
            ("0", "0"),
            ("2-5,8", "2-5,8"),
            ("8,2-5,3\n", "2-5,8"),
            ("0-1,2", "0-2"),
            ("0-7:1/2", "0,2,4,6"),
            ("0-9:2/5", "0-1,5-6"),
            ("1023", "1023"),
        ] {
            assert_eq!(list(text).to_string(), canonical);
        }
        assert_eq!(list("2-5,8").count(), 5);
    }

    #[test]
    fn the_bad_part_is_named() {
        let error = |text: &str| text.parse::<CpuList>().unwrap_err().to_string();
        for (text, part) in [
            ("0,two", "two"),
            ("0,1-", "1-"),
            ("0,-1", "-1"),
            ("+1", "+1"),
            ("0,4:1/2", "4:1/2"),
            ("0-3:0/2", "0-3:0/2"),
            ("0-3:3/2", "0-3:3/2"),
            ("0-3:1", "0-3:1"),
            ("99999999999999999999", "99999999999999999999"),
        ] {
            assert!(error(text).contains(&format!("{part:?} is neither")), "{text}: {}", error(text));
        }
        assert!(error("0,5-2").contains("\"5-2\" goes backwards"));
        assert!(error("1024").contains("no processor 1024 in \"1024\": numbers end at 1023"));
        assert!(error(" , ").contains("names no processor"));
    }

    #[test]
    fn lists_are_compared() {
        assert_eq!(list("0-5").without(&list("4-9")), Some(list("0-3")));
        assert_eq!(list("0").without(&list("0")), None);
    }

    #[test]
    fn a_list_becomes_a_mask() {
        let set = CpuSet::from(&list("1,3"));
        assert_eq!((set.count(), set.is_set(1), set.is_set(2), set.is_set(3)), (2, true, false, true));
    }
}
