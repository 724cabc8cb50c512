//! The lines that a guest prints.

/// What a guest reported about itself.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct GuestReport {
    /// Pages written so far.
    pub count: u64,
    /// Pages and disk blocks that did not hold what they must. Anything but 0 is a loss.
    pub errors: u64,
    /// Sweeps over all pages that were completed: after two more, every page was verified.
    pub sweeps: u64,
    /// Disk reads that were verified.
    pub disk: u64,
}

/// A line that means something.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Event {
    /// The guest works.
    Ready,
    /// Its figures.
    Report(GuestReport),
    /// Something was wrong, in its words.
    Error(String),
}

/// What every line of a guest begins with.
const PREFIX: &str = "xferry-guest ";

impl Event {
    /// Understands one line; other text on the console, and lines that lack a part, are nothing.
    pub(super) fn parse(line: &str) -> Option<Self> {
        // A terminal ends its lines with \r\n.
        let line = line.trim_end();
        let text = line.strip_prefix(PREFIX)?;
        if text == "ready" {
            Some(Self::Ready)
        } else if text.starts_with("ERROR ") || text.starts_with("PANIC ") {
            Some(Self::Error(line.to_owned()))
        } else {
            GuestReport::parse(text).map(Self::Report)
        }
    }
}

impl GuestReport {
    fn parse(text: &str) -> Option<Self> {
        let mut words = text.split(' ');
        let mut figure = |name: &str| words.next()?.strip_prefix(name)?.strip_prefix('=')?.parse().ok();
        let report = Self {
            count: figure("count")?,
            errors: figure("errors")?,
            sweeps: figure("sweeps")?,
            disk: figure("disk")?,
        };
        words.next().is_none().then_some(report)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn understands_the_guests() {
        assert_eq!(Event::parse("xferry-guest ready\r"), Some(Event::Ready));
        let report = GuestReport { count: u64::MAX, errors: 1, sweeps: 2, disk: 3 };
        let line = format!("xferry-guest count={} errors=1 sweeps=2 disk=3", u64::MAX);
        assert_eq!(Event::parse(&line), Some(Event::Report(report)));
        let error = "xferry-guest ERROR 5 want=0x1 got=0x2 word=7";
        assert_eq!(Event::parse(error), Some(Event::Error(error.into())));
    }

    #[test]
    fn ignores_everything_else() {
        for line in [
            "",
            "ready",
            "xferry-guest note: pages=1",
            "xferry-guest count=1 errors=0 sweeps=0",
            "xferry-guest count=1 errors=0 sweeps=0 disk=",
            "xferry-guest count=1 errors=0 sweeps=0 disk=0 more=0",
            "xferry-guest count=-1 errors=0 sweeps=0 disk=0",
            "xferry-guest errors=0 count=1 sweeps=0 disk=0",
            "guest count=1 errors=0 sweeps=0 disk=0",
            "xferry-guest xferry-guest count=1 errors=0 sweeps=0 disk=0",
        ] {
            assert_eq!(Event::parse(line), None, "{line}");
        }
    }
}
