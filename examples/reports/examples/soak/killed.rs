//! The same stream in a process that is killed, again and again.

use crate::kernels::Subject;
use crate::run::{Found, Place, Run};
use dijiang::StreamState;
use rand_chacha::ChaCha8Rng;
use rand_core::{Rng, SeedableRng};
use reports::lengths::lengths;
use serde::{Deserialize, Serialize};
use std::error::Error;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;
use std::{env, fs, process, thread};

/// Calls between two files.
const CALLS: usize = 8;

/// What is in the file.
#[derive(Serialize, Deserialize)]
struct Saved {
    place: Place,
    state: StreamState<f32>,
}

/// Goes on from the file, if there is one, to so many tokens; a file is always whole.
pub fn go_on(subject: &Subject, tokens: usize, path: &Path) -> Result<(), Box<dyn Error>> {
    let mut run = Run::new(subject)?;
    if path.exists() {
        let saved: Saved = serde_json::from_slice(&fs::read(path)?)?;
        run.restore(saved.place, &saved.state)?;
    }
    let save = |run: &Run<'_>| -> Result<(), Box<dyn Error>> {
        let saved = Saved { place: run.place.clone(), state: run.save()? };
        let new = path.with_extension("new");
        fs::write(&new, serde_json::to_vec(&saved)?)?;
        Ok(fs::rename(new, path)?)
    };
    // calls end where those of an uninterrupted run do
    let lengths = lengths(tokens);
    while run.place.tokens < tokens {
        let next = lengths.iter().find(|&&n| n > run.place.tokens).map_or(tokens, |&n| n);
        run.call(next - run.place.tokens)?;
        if run.place.calls.is_multiple_of(CALLS) {
            save(&run)?;
        }
    }
    save(&run)
}

/// Runs it in processes that are killed at random; gives how many were.
pub fn killed(subject: &Subject, tokens: usize, alone: &Found) -> Result<usize, Box<dyn Error>> {
    let path = env::temp_dir().join(format!("soak-{}-{}.json", process::id(), subject.name));
    let result = kill(subject, tokens, alone, &path);
    let _ = fs::remove_file(&path);
    let _ = fs::remove_file(path.with_extension("new"));
    result
}

fn kill(
    subject: &Subject,
    tokens: usize,
    alone: &Found,
    path: &Path,
) -> Result<usize, Box<dyn Error>> {
    const MOST: usize = 20;
    let mut random = ChaCha8Rng::seed_from_u64(tokens as u64);
    let mut kills = 0;
    loop {
        let mut child = Command::new(env::current_exe()?)
            .args(["--tokens", &tokens.to_string(), "--go-on", subject.name])
            .arg(path)
            .stdout(Stdio::null())
            .spawn()?;
        if kills < MOST {
            thread::sleep(Duration::from_millis(u64::from(random.next_u32() % 120)));
            if child.try_wait()?.is_none() {
                child.kill()?;
                kills += 1;
            }
        }
        let status = child.wait()?;
        if status.success() {
            break;
        }
        if status.code().is_some_and(|code| code != 0) {
            return Err(format!("{}: a process failed: {status}", subject.name).into());
        }
    }
    let saved: Saved = serde_json::from_slice(&fs::read(path)?)?;
    if (saved.place.tokens, saved.place.print) != (tokens, alone.print) {
        return Err(format!("{}: killed {kills} times, it gives other bits", subject.name).into());
    }
    Ok(kills)
}
