//! The serial console: one thread writes it, so that a slow reader stops no work and no two lines mix.

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

use crate::workload::{Counters, Line, Mismatch, Reporter, error_line, report_line};

/// The console, before reports begin.
pub struct Console {
    file: File,
}

/// Where threads leave their figures and errors.
#[derive(Clone)]
pub struct Board {
    figures: Arc<Figures>,
    lines: Sender<Line>,
}

#[derive(Default)]
struct Figures {
    count: AtomicU64,
    errors: AtomicU64,
    sweeps: AtomicU64,
    disk: AtomicU64,
}

impl Console {
    /// Opens the console that the kernel was told to use.
    pub fn open() -> Result<Self> {
        let path = "/dev/console";
        let file = OpenOptions::new()
            .write(true)
            .open(path)
            .with_context(|| format!("{path} cannot be opened, is devtmpfs mounted?"))?;
        Ok(Console { file })
    }

    /// Writes a line in one piece.
    pub fn write(&mut self, line: &Line) {
        // Nobody could be told about an error here; a console that is gone must not end the workload.
        let _ = self.file.write_all(line.as_bytes());
    }

    /// Reports regularly what is left on the board.
    pub fn report_from_now_on(self) -> Board {
        let (lines, received) = channel();
        let board = Board { figures: Arc::default(), lines };
        let figures = board.figures.clone();
        thread::spawn(move || report(self, &figures, &received));
        board
    }
}

fn report(mut console: Console, figures: &Figures, lines: &Receiver<Line>) {
    const INTERVAL: Duration = Duration::from_millis(100);
    let start = Instant::now();
    let mut reporter = Reporter::new(1000);
    loop {
        let now = u64::try_from(start.elapsed().as_millis()).unwrap_or(u64::MAX);
        if reporter.is_due(now) {
            console.write(&report_line(&figures.read()));
        }
        // A little longer than to the next report, never twice as long.
        if let Ok(line) = lines.recv_timeout(INTERVAL / 2) {
            console.write(&line);
        }
    }
}

impl Figures {
    fn read(&self) -> Counters {
        Counters {
            count: self.count.load(Relaxed),
            errors: self.errors.load(Relaxed),
            sweeps: self.sweeps.load(Relaxed),
            disk: self.disk.load(Relaxed),
        }
    }
}

impl Board {
    /// Replaces the figures of the memory workload; errors come one by one.
    pub fn publish(&self, counters: &Counters) {
        self.figures.count.store(counters.count, Relaxed);
        self.figures.sweeps.store(counters.sweeps, Relaxed);
    }

    /// Counts a disk read that was verified.
    pub fn disk_read(&self) {
        self.figures.disk.fetch_add(1, Relaxed);
    }

    /// Counts an error and describes it, unless many were described already.
    pub fn error(&self, mismatch: &Mismatch) {
        let errors = self.figures.errors.fetch_add(1, Relaxed) + 1;
        if let Some(line) = error_line(mismatch, errors) {
            // The receiver lives as long as the program.
            let _ = self.lines.send(line);
        }
    }
}
