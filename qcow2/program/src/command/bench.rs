//! `bench`: the same request many times over, and how long that took. It measures one image on this host and compares
//! nothing.

use std::collections::VecDeque;
use std::time::Instant;

use anyhow::{Context, bail, ensure};
use block::{BlockDevice, ByteRange};
use bytes::Bytes;
use tokio::task::JoinSet;

use crate::cache::Cache;
use crate::format::Format;
use crate::open::{self, Access, How, Named};
use crate::output::print;
use crate::size::{Size, human};
use crate::stop::Stop;

/// Time many requests of one size
#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// How many requests
    #[arg(short, long, value_name = "N", default_value_t = 75_000)]
    count: u32,

    /// How many at once
    #[arg(short, long, value_name = "N", default_value_t = 64)]
    depth: u32,

    /// The format of the image; qcow2 is recognised, everything else is said
    #[arg(short, long, value_name = "FMT")]
    format: Option<Format>,

    /// With -w: flush after every N requests
    #[arg(long, value_name = "N", default_value_t = 0)]
    flush_interval: u32,

    /// Taken for qemu-img's sake: the engine is chosen by what the host can (SENDENSE_IO=blocking forces threads)
    #[arg(short = 'i', long, value_name = "AIO", value_parser = ["native", "threads", "io_uring"])]
    aio: Option<String>,

    /// Taken for qemu-img's sake, as -i
    #[arg(short = 'n', long)]
    native: bool,

    /// FILE is a list of options: driver=qcow2,file.filename=PATH
    #[arg(long)]
    image_opts: bool,

    /// With --flush-interval: go on with requests while a flush runs
    #[arg(long)]
    no_drain: bool,

    /// Where the first request begins
    #[arg(short, long, value_name = "BYTES", default_value = "0")]
    offset: Size,

    /// With -w: the byte that is written
    #[arg(long, value_name = "BYTE", default_value = "0", value_parser = byte)]
    pattern: u8,

    /// Print nothing but errors
    #[arg(short, long)]
    quiet: bool,

    /// The size of a request
    #[arg(short = 's', long, value_name = "BYTES", default_value = "4k")]
    buffer_size: Size,

    /// From one request to the next; the size of a request unless said
    #[arg(short = 'S', long, value_name = "BYTES", default_value = "0")]
    step_size: Size,

    /// How the image is written: none, writeback, writethrough, directsync or unsafe
    #[arg(short = 't', long, value_name = "CACHE")]
    cache: Option<Cache>,

    /// Write instead of reading: destroys what the image holds
    #[arg(short, long)]
    write: bool,

    /// Read it although another program may be writing it
    #[arg(short = 'U', long, conflicts_with = "write")]
    force_share: bool,

    #[command(flatten)]
    access: Access,

    /// The image
    #[arg(value_name = "FILE")]
    file: String,
}

/// A byte as a number, also in hexadecimal.
fn byte(text: &str) -> Result<u8, String> {
    let number = match text.strip_prefix("0x") {
        Some(digits) => u8::from_str_radix(digits, 16),
        None => text.parse(),
    };
    number.map_err(|_| format!("Invalid pattern byte specified: {text}"))
}

pub(crate) async fn run(options: Options, stop: &Stop) -> anyhow::Result<u8> {
    let buffer = options.buffer_size.0;
    ensure!(options.count > 0, "Invalid request count specified");
    let valid = (1..=i32::MAX.unsigned_abs().into()).contains(&buffer);
    ensure!(valid, "Invalid buffer size specified");
    ensure!(options.depth > 0, "Invalid queue depth specified");
    if options.flush_interval > 0 {
        ensure!(options.write, "--flush-interval is only available in write tests");
        ensure!(
            options.flush_interval >= options.depth,
            "Flush interval can't be smaller than depth"
        );
    }
    let named = Named::parse(&options.file, options.format, options.image_opts)?;
    let how = match options.write {
        true => How::writing(options.cache),
        false => How::reading(options.cache, options.force_share),
    };
    let opened = open::open(&named, &how, &options.access).await?;
    announce(&options)?;
    let begun = Instant::now();
    let ran = stop.or(Bench::new(&options, &how, opened.device()).run()).await;
    let secs = begun.elapsed().as_secs_f64();
    ran.and(opened.close().await)?;
    if !options.quiet {
        print(&format!("Run completed in {secs:.3} seconds.\n"))?;
        let count = f64::from(options.count);
        #[expect(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "a rate for people: the fraction is not told, and no rate is negative"
        )]
        let rate = (count * buffer as f64 / secs) as u64;
        print(&format!("{:.0} requests/s, {}/s\n", count / secs, human(rate)))?;
    }
    Ok(0)
}

fn announce(options: &Options) -> anyhow::Result<()> {
    if options.quiet {
        return Ok(());
    }
    print(&format!(
        "Sending {} {} requests, {} bytes each, {} in parallel (starting at offset {}, step size {})\n",
        options.count,
        if options.write { "write" } else { "read" },
        options.buffer_size.0,
        options.depth,
        options.offset.0,
        step(options)
    ))?;
    if options.flush_interval > 0 {
        print(&format!("Sending flush every {} requests\n", options.flush_interval))?;
    }
    Ok(())
}

fn step(options: &Options) -> u64 {
    if options.step_size.0 == 0 { options.buffer_size.0 } else { options.step_size.0 }
}

/// The requests that are still to be sent.
struct Bench {
    device: std::sync::Arc<dyn BlockDevice>,
    data: Option<Bytes>,
    durability: block::Durability,
    len: u64,
    step: u64,
    next: u64,
    left: u32,
    depth: usize,
    flush_interval: u32,
    drain: bool,
}

impl Bench {
    fn new(options: &Options, how: &How, device: std::sync::Arc<dyn BlockDevice>) -> Self {
        let len = options.buffer_size.0;
        let bytes = usize::try_from(len).unwrap_or(0);
        Self {
            data: options.write.then(|| Bytes::from(vec![options.pattern; bytes])),
            durability: how.cache.write,
            len,
            step: step(options),
            next: options.offset.0,
            left: options.count,
            depth: usize::try_from(options.depth).unwrap_or(usize::MAX),
            flush_interval: options.flush_interval,
            drain: !options.no_drain,
            device,
        }
    }

    async fn run(mut self) -> anyhow::Result<()> {
        let size = self.device.limits().size_bytes;
        ensure!(self.len <= size, "a request of {} bytes does not fit a disk of {size}", self.len);
        let mut running = JoinSet::new();
        let mut flushes = VecDeque::new();
        while self.left > 0 || !running.is_empty() {
            while self.left > 0 && running.len() < self.depth {
                running.spawn(request(
                    self.device.clone(),
                    self.place(size),
                    self.data.clone(),
                    self.durability,
                ));
                self.left -= 1;
                if self.flush_interval > 0 && self.left.is_multiple_of(self.flush_interval) {
                    if self.drain {
                        while let Some(done) = running.join_next().await {
                            done.context("a request was lost")??;
                        }
                        self.device.flush().await.context("Failed flush request")?;
                    } else {
                        let device = self.device.clone();
                        flushes.push_back(tokio::spawn(async move { device.flush().await }));
                    }
                }
            }
            if let Some(done) = running.join_next().await {
                done.context("a request was lost")??;
            }
        }
        for flush in flushes {
            flush.await.context("a flush was lost")?.context("Failed flush request")?;
        }
        Ok(())
    }

    /// Where the next request goes: around, so that each lies on the disk.
    fn place(&mut self, size: u64) -> ByteRange {
        if self.next > size - self.len {
            self.next %= (size - self.len).max(1);
        }
        let at = self.next;
        self.next = at.saturating_add(self.step);
        ByteRange::between(at, at + self.len)
    }
}

async fn request(
    device: std::sync::Arc<dyn BlockDevice>,
    range: ByteRange,
    data: Option<Bytes>,
    durability: block::Durability,
) -> anyhow::Result<()> {
    let done = match data {
        Some(data) => device.write(range.start(), data, durability).await,
        None => device.read(range).await.map(drop),
    };
    match done {
        Ok(()) => Ok(()),
        Err(error) => bail!("Failed request: {error}"),
    }
}
