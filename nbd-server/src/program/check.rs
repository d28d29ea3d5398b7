//! Whether what is configured could be served: the start, in a process that takes and changes nothing. What that means
//! for images is told in `images`, and for sockets in `places`.

use std::time::Duration;

use anyhow::{Context, bail};
use nbd_server::Server;

use super::catalogue::Catalogue;
use super::config::Config;
use super::errors::text_of;
use super::images::Opening;
use super::made::Made;
use super::options::Options;
use super::places::Places;
use super::reload::Reloading;
use super::sockets::{self, Asked};
use super::{become_user, socket_options};

/// How long images that were only looked at may take to close.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(20);

/// Goes the way of the start, its user included, with images opened beside whoever has them, and tells what would be
/// served.
///
/// # Errors
/// All that could not be.
pub(super) fn check(
    options: &Options,
    reloading: &Reloading,
    config: Option<&Config>,
    listen: &[Asked],
    how: Opening,
) -> anyhow::Result<()> {
    let mut wrong: Vec<String> = Vec::new();
    // A start goes on behind it; who checks a file may be about to reload it.
    let unfinished = config.into_iter().flat_map(|config| &config.remarks);
    wrong.extend(unfinished.filter(|remark| remark.unfinished).map(ToString::to_string));
    let server_config = reloading.server_config(config);
    wrong.extend(server_config.as_ref().err().map(text_of));
    let mut places = Places::default();
    let (addresses, refused) = sockets::resolve(listen);
    wrong.extend(refused.0.iter().map(text_of));
    let made = sockets::make(&mut places, addresses, &socket_options(options, config));
    wrong.extend(made.err().map(|refused| refused.to_string()));
    wrong.extend(metrics(&mut places, options, config).err().map(|error| text_of(&error)));
    wrong.extend(become_user(config).err().map(|error| text_of(&error)));
    let references = config.and_then(|config| config.generic.references.as_ref());
    let wanted = reloading.wanted(config);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let looked = runtime.block_on(async {
        let can_serve = server_config.is_ok();
        let server = Server::new(server_config.unwrap_or_default());
        let mut catalogue = Catalogue::new(server, Opening { only_looks: true, ..how });
        let looked = if can_serve {
            catalogue.apply(&wanted, references, |exports| exports).await.map(drop)
        } else {
            // What exports demand of certificates that cannot be used is not told.
            catalogue.prepare(&wanted, references, &mut Made::rehearsed()).await.map(drop)
        };
        catalogue.end(CLOSE_TIMEOUT).await;
        looked
    });
    wrong.extend(looked.err().map(|refused| refused.to_string()));
    if !wrong.is_empty() {
        bail!(wrong.join("\n"));
    }
    let files = config.map_or(0, |config| config.files.len());
    println!("{} exports in {files} files: all is well", wanted.len());
    Ok(())
}

/// Whether counters could be told where that is asked for.
#[cfg(feature = "metrics")]
fn metrics(places: &mut Places, options: &Options, config: Option<&Config>) -> anyhow::Result<()> {
    match super::metrics_address(options, config) {
        Some(address) => {
            let cannot = || super::cannot_tell_counters(address, options, config);
            places.tcp(address, false).with_context(cannot)
        }
        None => Ok(()),
    }
}

#[cfg(not(feature = "metrics"))]
fn metrics(_: &mut Places, _: &Options, _: Option<&Config>) -> anyhow::Result<()> {
    Ok(())
}
