//! Who has the VM, written down before it is acted on.
//!
//! One file on each host, append-only, each line `CRC32C JSON`. Every record that matters is on disk before its
//! consequence happens, so an agent that was killed finds out after its restart, together with its peer, who has
//! the VM. What is written:
//!
//! * the source, before it touches the VM: *offered* (session, VM, peer); at the end: *concluded*;
//! * the destination, before its VMM waits: *waiting* (session, VM); before the vCPUs start: *accepted*; when the VM
//!   never ran and never will: *refused*.
//!
//! Accepting and refusing exclude each other and the first one wins, so a source that asks after a lost
//! connection gets an answer that no commit still on its way can overturn.

use std::{
    collections::BTreeMap,
    fs::{File, OpenOptions},
    io::{self, Write},
    net::SocketAddr,
    path::{Path, PathBuf},
    sync::{Mutex, MutexGuard, PoisonError},
};

use serde::{Deserialize, Serialize};

/// Sessions that are remembered after their end, for a peer that asks late.
const REMEMBERED: usize = 1000;
/// Largest journal that is read, bytes.
const MAX_FILE: u64 = 64 << 20;

/// What the destination decided about a session.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Verdict {
    /// It took the VM.
    Accepted,
    /// It did not, and will not.
    Refused,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "record", rename_all = "kebab-case")]
enum Record {
    Offered { session: u64, vm: String, peer: SocketAddr },
    Waiting { session: u64, vm: String },
    Decided { session: u64, verdict: Verdict },
    Concluded { session: u64 },
}

/// Which part this host has in a session.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Role {
    /// The VM was to leave, to this peer.
    Source(SocketAddr),
    /// The VM was to come.
    Destination,
}

/// A session that has no end yet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OpenSession {
    /// Number of the migration.
    pub session: u64,
    /// The VM.
    pub vm: String,
    /// This host's part.
    pub role: Role,
    /// What was decided here.
    pub verdict: Option<Verdict>,
}

#[derive(Clone, Debug, Default)]
struct Entry {
    vm: String,
    role: Option<Role>,
    verdict: Option<Verdict>,
    concluded: bool,
    /// Order of first mention.
    number: u64,
}

struct Inner {
    file: File,
    sessions: BTreeMap<u64, Entry>,
    next: u64,
}

/// The journal of one host.
pub struct Journal {
    path: PathBuf,
    inner: Mutex<Inner>,
}

impl Journal {
    /// Opens or creates it. A torn last line, as a crash leaves it, is cut off; a bad line before the last is an
    /// error, because what it said is not known.
    ///
    /// # Errors
    /// What the file system says, or `InvalidData` with the line's number.
    pub fn open(path: &Path) -> io::Result<Self> {
        let mut sessions = BTreeMap::new();
        let mut next = 0;
        match std::fs::metadata(path) {
            Ok(metadata) if metadata.len() > MAX_FILE => {
                return Err(io::Error::new(
                    io::ErrorKind::InvalidData,
                    format!("{} bytes are too many", metadata.len()),
                ));
            }
            Ok(_) => {
                for record in parse(&std::fs::read(path)?)? {
                    apply(&mut sessions, &mut next, record);
                }
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(error),
        }
        let file = rewrite(path, &mut sessions)?;
        Ok(Self { path: path.to_owned(), inner: Mutex::new(Inner { file, sessions, next }) })
    }

    /// Its file, for messages.
    pub fn path(&self) -> &Path {
        &self.path
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The source is about to touch the VM.
    ///
    /// # Errors
    /// When it cannot be written down: then the VM must not be touched.
    pub fn offer(&self, session: u64, vm: &str, peer: SocketAddr) -> io::Result<()> {
        self.lock().append(Record::Offered { session, vm: vm.to_owned(), peer })
    }

    /// The destination is about to have a VMM wait.
    ///
    /// # Errors
    /// When it cannot be written down: then no VMM must be started.
    pub fn wait(&self, session: u64, vm: &str) -> io::Result<()> {
        self.lock().append(Record::Waiting { session, vm: vm.to_owned() })
    }

    /// Decides about a session, unless that was done before: returns the decision that stands. Also refuses
    /// sessions that were never heard of.
    ///
    /// # Errors
    /// When it cannot be written down: then nothing is decided.
    pub fn decide(&self, session: u64, verdict: Verdict) -> io::Result<Verdict> {
        let mut inner = self.lock();
        if let Some(before) = inner.sessions.get(&session).and_then(|entry| entry.verdict) {
            return Ok(before);
        }
        inner.append(Record::Decided { session, verdict })?;
        Ok(verdict)
    }

    /// Takes an acceptance back: the VM was ended before it ever ran.
    ///
    /// # Errors
    /// When it cannot be written down.
    pub fn revoke(&self, session: u64) -> io::Result<()> {
        let mut inner = self.lock();
        if inner.sessions.get(&session).and_then(|entry| entry.verdict) == Some(Verdict::Refused) {
            return Ok(());
        }
        inner.append(Record::Decided { session, verdict: Verdict::Refused })
    }

    /// Nothing is left to do for a session.
    ///
    /// # Errors
    /// When it cannot be written down; it will then be looked at again after a restart, which is harmless.
    pub fn conclude(&self, session: u64) -> io::Result<()> {
        let mut inner = self.lock();
        let written = inner.append(Record::Concluded { session });
        // True in any case; on disk it only saves work after a restart.
        if let Some(entry) = inner.sessions.get_mut(&session) {
            entry.concluded = true;
        }
        written
    }

    /// Whether a session has begun and has no end yet.
    pub fn is_open(&self, session: u64) -> bool {
        self.lock().sessions.get(&session).is_some_and(|entry| entry.role.is_some() && !entry.concluded)
    }

    /// Sessions without an end.
    pub fn open_sessions(&self) -> Vec<OpenSession> {
        let inner = self.lock();
        let open = inner.sessions.iter().filter(|(_, entry)| !entry.concluded);
        open.filter_map(|(&session, entry)| {
            Some(OpenSession {
                session,
                vm: entry.vm.clone(),
                role: entry.role.clone()?,
                verdict: entry.verdict,
            })
        })
        .collect()
    }
}

impl Inner {
    /// Writes a record and waits until it is on disk.
    fn append(&mut self, record: Record) -> io::Result<()> {
        let length = self.file.metadata()?.len();
        let written = self.file.write_all(&line(&record)).and_then(|()| self.file.sync_data());
        if let Err(error) = written {
            // Half a line must not stay in front of later ones.
            let _ = self.file.set_len(length);
            return Err(error);
        }
        apply(&mut self.sessions, &mut self.next, record);
        Ok(())
    }
}

fn line(record: &Record) -> Vec<u8> {
    // Plain enums of strings and numbers always have a JSON form.
    let json = serde_json::to_string(record).unwrap_or_default();
    format!("{:08x} {json}\n", crc32c::crc32c(json.as_bytes())).into_bytes()
}

/// Reads a journal's bytes.
fn parse(bytes: &[u8]) -> io::Result<Vec<Record>> {
    let mut records = Vec::new();
    let mut lines = bytes.split_inclusive(|&byte| byte == b'\n').enumerate().peekable();
    while let Some((number, line)) = lines.next() {
        match parse_line(line) {
            Some(record) => records.push(record),
            None if lines.peek().is_none() => break,
            None => {
                return Err(io::Error::new(
                    io::ErrorKind::InvalidData,
                    format!("line {} is damaged, and what it said about a VM is not known", number + 1),
                ));
            }
        }
    }
    Ok(records)
}

fn parse_line(line: &[u8]) -> Option<Record> {
    let line = line.strip_suffix(b"\n")?;
    let (sum, json) = line.split_at_checked(8)?;
    let sum = u32::from_str_radix(std::str::from_utf8(sum).ok()?, 16).ok()?;
    let json = json.strip_prefix(b" ")?;
    (crc32c::crc32c(json) == sum).then(|| serde_json::from_slice(json).ok()).flatten()
}

fn apply(sessions: &mut BTreeMap<u64, Entry>, next: &mut u64, record: Record) {
    let (Record::Offered { session, .. }
    | Record::Waiting { session, .. }
    | Record::Decided { session, .. }
    | Record::Concluded { session }) = record;
    let entry = sessions.entry(session).or_default();
    if entry.number == 0 {
        *next += 1;
        entry.number = *next;
    }
    match record {
        Record::Offered { vm, peer, .. } => {
            entry.vm = vm;
            entry.role = Some(Role::Source(peer));
        }
        Record::Waiting { vm, .. } => {
            entry.vm = vm;
            entry.role = Some(Role::Destination);
        }
        Record::Decided { verdict, .. } => entry.verdict = Some(verdict),
        Record::Concluded { .. } => entry.concluded = true,
    }
}

/// Writes what is still needed to a new file and puts it in the old one's place.
fn rewrite(path: &Path, sessions: &mut BTreeMap<u64, Entry>) -> io::Result<File> {
    let mut ended: Vec<(u64, u64)> = sessions
        .iter()
        .filter(|(_, entry)| entry.concluded || entry.role.is_none())
        .map(|(&session, entry)| (entry.number, session))
        .collect();
    ended.sort_unstable();
    for (_, session) in ended.iter().take(ended.len().saturating_sub(REMEMBERED)) {
        sessions.remove(session);
    }
    let mut text = Vec::new();
    for (&session, entry) in sessions.iter() {
        let vm = entry.vm.clone();
        match entry.role {
            Some(Role::Source(peer)) => text.extend(line(&Record::Offered { session, vm, peer })),
            Some(Role::Destination) => text.extend(line(&Record::Waiting { session, vm })),
            None => {}
        }
        if let Some(verdict) = entry.verdict {
            text.extend(line(&Record::Decided { session, verdict }));
        }
        if entry.concluded {
            text.extend(line(&Record::Concluded { session }));
        }
    }
    let temporary = path.with_extension("new");
    let mut file = File::create(&temporary)?;
    file.write_all(&text)?;
    file.sync_all()?;
    std::fs::rename(&temporary, path)?;
    if let Some(directory) = path.parent() {
        File::open(directory)?.sync_all()?;
    }
    OpenOptions::new().append(true).open(path)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn peer() -> SocketAddr {
        "10.0.0.2:4790".parse().unwrap()
    }

    fn journal() -> (tempfile::TempDir, PathBuf, Journal) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("handover.journal");
        let journal = Journal::open(&path).unwrap();
        (dir, path, journal)
    }

    #[test]
    fn what_was_written_is_known_after_a_restart() {
        let (_dir, path, journal) = journal();
        journal.offer(1, "web", peer()).unwrap();
        journal.wait(2, "db").unwrap();
        assert_eq!(journal.decide(2, Verdict::Accepted).unwrap(), Verdict::Accepted);
        journal.offer(3, "done", peer()).unwrap();
        journal.conclude(3).unwrap();
        drop(journal);
        for _ in 0..2 {
            let journal = Journal::open(&path).unwrap();
            assert_eq!(
                journal.open_sessions(),
                [
                    OpenSession { session: 1, vm: "web".into(), role: Role::Source(peer()), verdict: None },
                    OpenSession {
                        session: 2,
                        vm: "db".into(),
                        role: Role::Destination,
                        verdict: Some(Verdict::Accepted)
                    },
                ]
            );
        }
    }

    #[test]
    fn the_first_decision_stands() {
        let (_dir, path, journal) = journal();
        assert_eq!(journal.decide(7, Verdict::Refused).unwrap(), Verdict::Refused);
        assert_eq!(journal.decide(7, Verdict::Accepted).unwrap(), Verdict::Refused);
        journal.decide(8, Verdict::Accepted).unwrap();
        assert_eq!(journal.decide(8, Verdict::Refused).unwrap(), Verdict::Accepted);
        journal.revoke(8).unwrap();
        drop(journal);
        let journal = Journal::open(&path).unwrap();
        assert_eq!(journal.decide(7, Verdict::Accepted).unwrap(), Verdict::Refused);
        assert_eq!(journal.decide(8, Verdict::Accepted).unwrap(), Verdict::Refused);
    }

    #[test]
    fn a_torn_tail_is_cut_and_a_damaged_middle_is_not_ignored() {
        let (_dir, path, journal) = journal();
        journal.offer(1, "web", peer()).unwrap();
        journal.offer(2, "db", peer()).unwrap();
        drop(journal);
        let whole = std::fs::read(&path).unwrap();
        for cut in 0..whole.len() {
            std::fs::write(&path, &whole[..cut]).unwrap();
            let open = Journal::open(&path).unwrap().open_sessions().len();
            let lines = whole[..cut].iter().filter(|&&byte| byte == b'\n').count();
            assert_eq!(open, lines, "cut at {cut}");
        }
        let mut damaged = whole.clone();
        damaged[12] ^= 1;
        std::fs::write(&path, &damaged).unwrap();
        let error = Journal::open(&path).err().unwrap();
        assert!(error.to_string().contains("line 1"), "{error}");
    }

    #[test]
    fn a_full_disk_is_an_error_and_nothing_is_decided() {
        let full = Path::new("/dev/full");
        if !full.exists() {
            println!("skipped: a_full_disk_is_an_error: there is no /dev/full here");
            return;
        }
        let (_dir, _path, journal) = journal();
        journal.lock().file = OpenOptions::new().append(true).open(full).unwrap();
        assert!(journal.offer(1, "web", peer()).is_err());
        assert!(journal.decide(1, Verdict::Accepted).is_err());
        assert!(journal.open_sessions().is_empty());
    }

    #[test]
    fn old_ends_are_forgotten_and_open_ones_never() {
        let (_dir, path, journal) = journal();
        journal.offer(1_000_000, "web", peer()).unwrap();
        {
            let mut inner = journal.lock();
            for session in 0..REMEMBERED as u64 + 50 {
                let text = line(&Record::Decided { session, verdict: Verdict::Refused });
                inner.file.write_all(&text).unwrap();
            }
        }
        drop(journal);
        let journal = Journal::open(&path).unwrap();
        assert_eq!(journal.open_sessions().len(), 1);
        assert_eq!(journal.lock().sessions.len(), REMEMBERED + 1);
        assert!(!journal.lock().sessions.contains_key(&0), "the oldest went");
    }

    proptest! {
        #[test]
        fn arbitrary_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            let _ = parse(&bytes);
        }
    }
}
