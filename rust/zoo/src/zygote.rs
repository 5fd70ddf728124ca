//! A zygote without an interpreter, for tests. Its configuration is a behaviour.
//!
//! Released workers print their arguments and environment, and exit with the last argument.

use std::ffi::CString;
use std::io::Write;
use std::path::Path;
use std::process::exit;

use ferroelastic_core::sys::fork::{Forked, fork_sibling};
use ferroelastic_core::sys::procfs;
use ferroelastic_core::warm::ImportedFiles;
use ferroelastic_core::warm::zygote::Zygote;

fn main() {
    let mut zygote = Zygote::start().expect("a channel");
    let configuration = zygote.receive().expect("a message").expect("a configuration");
    let behaviour = String::from_utf8(configuration).expect("text");
    match behaviour.as_str() {
        "refuse" => {
            zygote.report_refusal("it does not want to").expect("reported");
            pause()
        }
        "import for ever" => pause(),
        "end" => exit(3),
        _ => {}
    }
    let imported = ImportedFiles::take([Path::new("/proc/self/exe")]).expect("a list");
    zygote.report_ready(&imported).expect("reported");
    drop(imported);
    while let Some(count) = zygote.next_order().expect("an order") {
        for _ in 0..count {
            if behaviour == "shortage" {
                zygote.report_shortage("no room").expect("reported");
                break;
            }
            let fork = || {
                let forked = fork_sibling()?;
                if let (Forked::Caller { pid }, "die unreported") = (&forked, behaviour.as_str()) {
                    die_before_the_report_of(*pid);
                }
                Ok(forked)
            };
            match zygote.fork(fork).expect("forked") {
                Forked::Caller { .. } => {}
                Forked::Child if behaviour == "children end" => exit(5),
                Forked::Child => worker(zygote, &behaviour),
            }
        }
    }
}

fn pause() -> ! {
    loop {
        std::thread::park();
    }
}

/// Ends when the child has come as far as it can without its report.
fn die_before_the_report_of(child: i32) -> ! {
    while procfs::stat(child).is_some_and(|stat| stat.state != 'S') {
        std::thread::yield_now();
    }
    exit(0)
}

fn worker(mut zygote: Zygote, behaviour: &str) -> ! {
    zygote.separate().expect("a session");
    if behaviour == "die unreported" {
        pause();
    }
    let Some(release) = zygote.park().expect("released") else { exit(0) };

    let text = |strings: &[CString]| strings.iter().map(|one| one.to_string_lossy().into_owned()).collect::<Vec<_>>();
    let argv = text(&release.argv);
    let mut stdout = std::io::stdout().lock();
    let _ = writeln!(stdout, "{} {}", argv.join(" "), text(&release.env).join(" "));
    if argv.iter().any(|word| word == "show") {
        let read = |name: &str| {
            let text = std::fs::read_to_string(format!("/proc/self/{name}")).unwrap_or_default();
            text.trim_end_matches(['\0', '\n']).replace('\0', " ")
        };
        for name in ["comm", "cmdline", "environ"] {
            let _ = writeln!(stdout, "{name}={}", read(name));
        }
        let open = std::fs::read_dir("/proc/self/fd").map_or(0, Iterator::count);
        let _ = writeln!(stdout, "descriptors={}", open - 1); // without the folder
    }
    drop(stdout);
    exit(argv.last().and_then(|code| code.parse().ok()).unwrap_or(0))
}
