//! Reading a guest's serial console while it grows.

use std::fs::File;
use std::io::{ErrorKind, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant, SystemTime};

use anyhow::{Context, Result, bail};

use super::report::{Event, GuestReport};

/// How long to wait before a file is looked at again; a guest reports every 100 ms.
const INTERVAL: Duration = Duration::from_millis(20);
/// Lines of the console that an error message shows.
const SHOWN: usize = 8;

/// What a guest printed, over all the files that QEMU processes wrote it to.
///
/// A guest that moves goes on printing into another file, and into the first one when it comes back: add all
/// of them. The newest report is that of the file that was written to last. A line that was cut in two by the
/// move is in neither file, and ignored.
///
/// Reading takes up where the last call ended. A file that does not exist yet is an empty one.
#[derive(Debug)]
pub struct SerialLog {
    files: Vec<Tail>,
    ready: bool,
    latest: Option<GuestReport>,
    errors: Vec<String>,
}

impl SerialLog {
    /// Reads this file.
    pub fn new(path: impl Into<PathBuf>) -> Self {
        let mut log = Self { files: Vec::new(), ready: false, latest: None, errors: Vec::new() };
        log.add(path);
        log
    }

    /// Reads this file, too.
    pub fn add(&mut self, path: impl Into<PathBuf>) {
        self.files.push(Tail::new(path.into()));
    }

    /// The newest report, if there was any.
    pub fn latest(&mut self) -> Option<GuestReport> {
        // What cannot be read says nothing new; the calls that wait say why.
        let _ = self.poll();
        self.latest
    }

    /// The lines that describe errors, in the order in which they came: the first twenty of a guest.
    pub fn errors_seen(&mut self) -> &[String] {
        let _ = self.poll();
        &self.errors
    }

    /// Waits until the guest works.
    ///
    /// # Errors
    /// If it does not say so in time, or a file cannot be read.
    pub fn wait_ready(&mut self, timeout: Duration) -> Result<()> {
        self.wait(timeout, "become ready", |log| log.ready.then_some(()))
    }

    /// Waits until the guest has written more pages than it had when this was called.
    ///
    /// A guest with a rate of 0 never does.
    ///
    /// # Errors
    /// If it does not in time, or a file cannot be read.
    pub fn wait_progress(&mut self, timeout: Duration) -> Result<GuestReport> {
        self.poll()?;
        let before = self.latest.map_or(0, |report| report.count);
        self.wait(timeout, "write pages", |log| log.latest.filter(|report| report.count > before))
    }

    fn wait<T>(
        &mut self,
        timeout: Duration,
        what: &str,
        mut goal: impl FnMut(&Self) -> Option<T>,
    ) -> Result<T> {
        let start = Instant::now();
        loop {
            self.poll()?;
            if let Some(reached) = goal(self) {
                return Ok(reached);
            }
            if start.elapsed() > timeout {
                let seconds = timeout.as_secs_f32();
                bail!("the guest did not {what} within {seconds:.1} s; {}", self.describe());
            }
            thread::sleep(INTERVAL);
        }
    }

    /// Takes in what is new.
    fn poll(&mut self) -> Result<()> {
        let mut news = Vec::new();
        for file in &mut self.files {
            news.extend(file.read_on()?);
        }
        // Several files are new at once when one looks for the first time: the newest shall have the last word.
        news.sort_by_key(|(modified, _)| *modified);
        for event in news.into_iter().flat_map(|(_, events)| events) {
            match event {
                Event::Ready => self.ready = true,
                Event::Report(report) => self.latest = Some(report),
                Event::Error(line) => self.errors.push(line),
            }
        }
        Ok(())
    }

    fn describe(&self) -> String {
        let latest = match self.latest {
            Some(GuestReport { count, errors, .. }) => format!("last report: count={count} errors={errors}"),
            None => "it never reported".to_owned(),
        };
        self.files.iter().fold(latest, |text, file| format!("{text}\n{}", file.describe()))
    }
}

/// A file and how much of it was read.
#[derive(Debug)]
struct Tail {
    path: PathBuf,
    read: u64,
    /// The last line, as long as it has no end.
    partial: Vec<u8>,
}

impl Tail {
    fn new(path: PathBuf) -> Self {
        Self { path, read: 0, partial: Vec::new() }
    }

    /// What whole lines were added since the last time, and when.
    fn read_on(&mut self) -> Result<Option<(SystemTime, Vec<Event>)>> {
        let added = match self.read_bytes() {
            Ok(None) => return Ok(None),
            Ok(Some(added)) => added,
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
            Err(error) => {
                let path = self.path.display();
                return Err(error)
                    .with_context(|| format!("reading the guest's console {path}, check its permissions"));
            }
        };
        let (modified, bytes) = added;
        self.partial.extend_from_slice(&bytes);
        let Some(end) = self.partial.iter().rposition(|&byte| byte == b'\n') else {
            return Ok(None);
        };
        let lines: Vec<u8> = self.partial.drain(..=end).collect();
        let events = String::from_utf8_lossy(&lines).lines().filter_map(Event::parse).collect();
        Ok(Some((modified, events)))
    }

    fn read_bytes(&mut self) -> std::io::Result<Option<(SystemTime, Vec<u8>)>> {
        let mut file = File::open(&self.path)?;
        let metadata = file.metadata()?;
        if metadata.len() < self.read {
            // A new QEMU started the file over.
            self.read = 0;
            self.partial.clear();
        }
        if metadata.len() == self.read {
            return Ok(None);
        }
        let mut bytes = Vec::new();
        file.seek(SeekFrom::Start(self.read))?;
        file.read_to_end(&mut bytes)?;
        self.read += bytes.len() as u64;
        Ok(Some((metadata.modified()?, bytes)))
    }

    fn describe(&self) -> String {
        let path = self.path.display();
        match last_lines(&self.path) {
            Ok(lines) if lines.is_empty() => format!("{path} is empty"),
            Ok(lines) => format!("{path} ends with:\n{lines}"),
            Err(error) => format!("{path}: {error}"),
        }
    }
}

fn last_lines(path: &Path) -> std::io::Result<String> {
    let text = std::fs::read(path)?;
    let text = String::from_utf8_lossy(&text);
    let lines: Vec<&str> = text.lines().collect();
    Ok(lines[lines.len().saturating_sub(SHOWN)..].join("\n"))
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test fails by panicking")]
mod tests {
    use std::io::Write;

    use super::*;

    struct Scratch(PathBuf);

    impl Scratch {
        fn new(name: &str) -> Self {
            let path = std::env::temp_dir().join(format!("xferry-serial-{name}-{}", std::process::id()));
            let _ = std::fs::remove_dir_all(&path);
            std::fs::create_dir(&path).unwrap();
            Self(path)
        }

        fn append(&self, name: &str, text: &str) -> PathBuf {
            let path = self.0.join(name);
            let mut file = File::options().append(true).create(true).open(&path).unwrap();
            file.write_all(text.as_bytes()).unwrap();
            path
        }
    }

    impl Drop for Scratch {
        fn drop(&mut self) {
            let _ = std::fs::remove_dir_all(&self.0);
        }
    }

    fn line(count: u64) -> String {
        format!("xferry-guest count={count} errors=0 sweeps=0 disk=0\r\n")
    }

    #[test]
    fn takes_whole_lines_only() {
        let scratch = Scratch::new("partial");
        let path = scratch.0.join("a");
        let mut log = SerialLog::new(&path);
        assert_eq!(log.latest(), None);
        scratch.append("a", "[ 0.1] booting\nxferry-guest re");
        assert!(log.wait_ready(Duration::ZERO).is_err());
        scratch.append("a", &format!("ady\n{}xferry-guest count=12", line(1)));
        log.wait_ready(Duration::ZERO).unwrap();
        assert_eq!(log.latest().unwrap().count, 1);
        scratch.append("a", "3 errors=1 sweeps=0 disk=0\nxferry-guest ERROR 1 want=1 got=2\n");
        assert_eq!(log.wait_progress(Duration::ZERO).map_err(|_| ()), Err(()));
        assert_eq!(log.latest().map(|report| (report.count, report.errors)), Some((123, 1)));
        assert_eq!(log.errors_seen(), ["xferry-guest ERROR 1 want=1 got=2"]);
    }

    #[test]
    fn follows_a_guest_there_and_back() {
        let scratch = Scratch::new("moves");
        let (a, b) = (scratch.append("a", &line(5)), scratch.0.join("b"));
        let mut log = SerialLog::new(&a);
        log.add(&b);
        assert_eq!(log.latest().unwrap().count, 5);
        // The rest of a line that began in the other file.
        scratch.append("b", &format!("count=6 errors=0\n{}", line(7)));
        assert_eq!(log.latest().unwrap().count, 7);
        thread::sleep(Duration::from_millis(20));
        scratch.append("a", &line(9));
        assert_eq!(log.latest().unwrap().count, 9);
        // One who looks only now sees both files grow at once.
        let mut late = SerialLog::new(&a);
        late.add(&b);
        assert_eq!(late.latest().unwrap().count, 9);
    }

    #[test]
    fn says_what_it_saw_when_time_is_up() {
        let scratch = Scratch::new("timeout");
        let mut log = SerialLog::new(scratch.append("a", "Kernel panic - not syncing\n"));
        let message = log.wait_ready(Duration::ZERO).unwrap_err().to_string();
        assert!(message.contains("did not become ready") && message.contains("Kernel panic"), "{message}");
    }

    #[test]
    fn a_file_started_over_is_read_from_its_beginning() {
        let scratch = Scratch::new("restart");
        let path = scratch.append("a", &line(100_000));
        let mut log = SerialLog::new(&path);
        assert_eq!(log.latest().unwrap().count, 100_000);
        std::fs::write(&path, line(1)).unwrap();
        assert_eq!(log.latest().unwrap().count, 1);
    }
}
