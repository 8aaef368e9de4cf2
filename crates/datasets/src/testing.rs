//! A data set of three training and two test images in every format, for the tests of this crate.

use std::collections::HashMap;
use std::io::{BufRead, BufReader, Cursor, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use flate2::Compression;
use flate2::write::GzEncoder;
use hub::Hub;
use image::{DynamicImage, ImageFormat, RgbImage};
use md5::{Digest, Md5};
use parquet::data_type::{ByteArray, ByteArrayType, Int64Type};
use parquet::file::writer::SerializedFileWriter;
use parquet::schema::parser::parse_message_type;

use crate::cifar::{CLASSES, Expected, Manifest, Release};
use crate::memory::{Images, InMemoryDataset};

/// The Python format of `images(3)` and `images(2)`, written by `make.py` next to these files.
pub const PICKLES: [&[u8]; 2] =
    [include_bytes!("../tests/fixtures/train"), include_bytes!("../tests/fixtures/test")];

/// Returns the value of a pixel by the formula of `make.py`.
fn value(i: usize, c: usize, y: usize, x: usize) -> u8 {
    ((i * 91 + c * 57 + y * 7 + x * 3) % 251) as u8
}

pub fn images(n: usize) -> Images {
    let pixels = (0..n).flat_map(|i| (0..3072).map(move |p| value(i, p % 3, p / 96, p / 3 % 32))).collect();
    let labels = (0..n).map(|i| ((i * 37 + 5) % 100) as u16).collect();
    Images { pixels, labels, height: 32, width: 32 }
}

pub fn binary(n: usize) -> Vec<u8> {
    let record = |i: usize| {
        let labels = [(i % 20) as u8, ((i * 37 + 5) % 100) as u8];
        labels.into_iter().chain((0..3072).map(move |p| value(i, p / 1024, p % 1024 / 32, p % 32)))
    };
    (0..n).flat_map(record).collect()
}

fn expected(contents: &[u8]) -> Expected {
    Expected { bytes: Some(contents.len() as u64), md5: format!("{:x}", Md5::digest(contents)) }
}

pub fn manifest(binary_archive: &[u8], python_archive: &[u8]) -> Manifest {
    Manifest {
        records: [3, 2],
        binary: Release { archive: expected(binary_archive), members: [3, 2].map(|n| expected(&binary(n))) },
        python: Release { archive: expected(python_archive), members: PICKLES.map(expected) },
        fingerprint: InMemoryDataset::new("cifar100", "", CLASSES, images(3), images(2)).unwrap().fingerprint,
    }
}

/// Writes a file and creates its folders.
pub fn write(path: &Path, contents: &[u8]) {
    std::fs::create_dir_all(path.parent().unwrap()).unwrap();
    std::fs::write(path, contents).unwrap();
}

pub fn tar_gz(folder: &str, names: &[&str], contents: &[Vec<u8>]) -> Vec<u8> {
    let mut tar = tar::Builder::new(GzEncoder::new(Vec::new(), Compression::fast()));
    let mut append = |name: &str, contents: &[u8]| {
        let mut header = tar::Header::new_gnu();
        header.set_size(contents.len() as u64);
        header.set_mode(0o644);
        tar.append_data(&mut header, format!("{folder}/{name}"), contents).unwrap();
    };
    append("names.txt", b"not of interest");
    names.iter().zip(contents).for_each(|(name, contents)| append(name, contents));
    tar.into_inner().unwrap().finish().unwrap()
}

/// Returns a parquet file in the hub's format with the flaw `flaw`; `"png"` has no flaw.
pub fn parquet(images: &Images, flaw: &str) -> Vec<u8> {
    let schema = "message schema {
        optional group img { optional binary bytes; optional binary path (UTF8); }
        optional int64 fine_label;
        optional int64 coarse_label;
    }";
    let schema = match flaw {
        "no column" => schema.replace("binary bytes", "binary other"),
        "unsigned" => schema.replace("_label", "_label (INTEGER(64, false))"),
        _ => schema.into(),
    };
    let n = images.len();
    let pngs = (0..n).map(|i| png(images.image(i), flaw)).collect();
    let paths = (0..n).map(|i| format!("drawing_{i}.png").into_bytes()).collect();
    let fine = images.labels.iter().map(|&label| label.into()).collect();
    write_parquet(&schema, [pngs, paths], &[fine, (0..n as i64).map(|i| i % 20).collect()])
}

/// Returns a parquet file with a group of two byte columns, followed by columns of integers.
pub fn write_parquet(schema: &str, bytes: [Vec<Vec<u8>>; 2], integers: &[Vec<i64>]) -> Vec<u8> {
    let schema = Arc::new(parse_message_type(schema).unwrap());
    let mut writer = SerializedFileWriter::new(Vec::new(), schema, Default::default()).unwrap();
    let mut group = writer.next_row_group().unwrap();
    // The definition levels, 2 and 1, say that no value and no group is missing.
    for column in bytes {
        let column: Vec<ByteArray> = column.into_iter().map(ByteArray::from).collect();
        let mut writer = group.next_column().unwrap().unwrap();
        writer.typed::<ByteArrayType>().write_batch(&column, Some(&vec![2; column.len()]), None).unwrap();
        writer.close().unwrap();
    }
    for column in integers {
        let mut writer = group.next_column().unwrap().unwrap();
        writer.typed::<Int64Type>().write_batch(column, Some(&vec![1; column.len()]), None).unwrap();
        writer.close().unwrap();
    }
    group.close().unwrap();
    writer.into_inner().unwrap()
}

fn png(pixels: &[u8], flaw: &str) -> Vec<u8> {
    let image = DynamicImage::ImageRgb8(RgbImage::from_raw(32, 32, pixels.to_vec()).unwrap());
    let image = match flaw {
        "grey" => image.grayscale(),
        "small" => image.crop_imm(0, 0, 16, 16),
        "huge" => DynamicImage::new_rgb8(4096, 4096),
        _ => image,
    };
    let mut out = Cursor::new(Vec::new());
    image.write_to(&mut out, ImageFormat::Png).unwrap();
    if flaw == "junk" {
        out.set_position(0);
        out.write_all(b"junk").unwrap();
    }
    out.into_inner()
}

/// The commit that a [`Server`] serves.
pub const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

/// The behaviour of a [`Server`].
#[derive(Clone, Copy, PartialEq)]
pub enum Mood {
    Good,
    /// Has no file.
    Empty,
    /// Accepts connections and never answers.
    Silent,
    /// Begins to send a file and never ends.
    Stalling,
    /// Ends a connection in the middle of a file.
    Truncating,
    /// Sends a file of the right length with a wrong byte.
    Corrupting,
    /// Answers every request with an internal error.
    Failing,
    /// Answers that the token is missing or invalid.
    Unauthorized,
    /// Answers that the token's account has no access.
    Forbidden,
    /// Answers that there were too many requests.
    Limiting,
    /// Sends a file byte by byte.
    Trickling,
    /// Sends a file without its length and never ends.
    Endless,
    /// Sends headers that would place a file outside the cache.
    Placing,
    /// Names a commit that leads out of the cache.
    Misnaming,
}

/// A path that leads out of the cache, for the server's headers and answers.
pub const OUTSIDE: &str = "../../../outside";

/// A small hub on the loopback address.
pub struct Server {
    pub endpoint: String,
    pub mood: Arc<Mutex<Mood>>,
    /// The methods and paths of the requests since the last call of [`Server::requests`].
    pub log: Arc<Mutex<Vec<String>>>,
}

/// The files of a repository by their paths.
type Files = HashMap<String, Vec<u8>>;

impl Server {
    /// Serves the two tables of CIFAR-100.
    pub fn start() -> Server {
        let files = [
            ("cifar100/train-00000-of-00001.parquet", parquet(&images(3), "png")),
            ("cifar100/test-00000-of-00001.parquet", parquet(&images(2), "png")),
        ];
        Server::of("uoft-cs/cifar100", None, files.map(|(name, contents)| (name.into(), contents)).into())
    }

    /// Serves the files of a data set's repository, to everybody or only with the token.
    pub fn of(repo: &'static str, token: Option<&'static str>, files: Files) -> Server {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let endpoint = format!("http://{}", listener.local_addr().unwrap());
        let (mood, log) = (Arc::new(Mutex::new(Mood::Good)), Arc::new(Mutex::new(Vec::new())));
        let server = Server { endpoint, mood: Arc::clone(&mood), log: Arc::clone(&log) };
        let files = Arc::new(files);
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let (mood, log, files) = (*mood.lock().unwrap(), Arc::clone(&log), Arc::clone(&files));
                // The client may close the connection at any time.
                std::thread::spawn(move || drop(serve(stream.unwrap(), repo, token, mood, &log, &files)));
            }
        });
        server
    }

    /// Returns a client for this hub, with its cache in the folder `home`.
    pub fn hub(&self, home: &Path) -> Hub {
        Hub {
            endpoint: self.endpoint.clone(),
            cache: home.join("hub"),
            token: None,
            offline: false,
            answer_timeout: Duration::from_secs(10),
            stall_timeout: Duration::from_secs(10),
            longest: 1 << 20,
        }
    }

    pub fn set(&self, mood: Mood) {
        *self.mood.lock().unwrap() = mood;
    }

    /// Returns the requests since the last call.
    pub fn requests(&self) -> Vec<String> {
        std::mem::take(&mut *self.log.lock().unwrap())
    }
}

/// Answers one request and closes the connection.
fn serve(
    mut stream: TcpStream,
    repo: &str,
    token: Option<&str>,
    mood: Mood,
    log: &Mutex<Vec<String>>,
    files: &Files,
) -> std::io::Result<()> {
    let mut lines = BufReader::new(stream.try_clone()?).lines();
    let request = lines.next().unwrap()?;
    let (method, path) = request.rsplit_once(' ').unwrap().0.split_once(' ').unwrap();
    let headers: Vec<String> = lines.map_while(|line| line.ok().filter(|line| !line.is_empty())).collect();
    log.lock().unwrap().push(format!("{method} {path}"));

    let value = |wanted: &str| {
        headers.iter().find_map(|header| {
            let (name, value) = header.split_once(": ").unwrap();
            name.eq_ignore_ascii_case(wanted).then_some(value)
        })
    };
    let mood = match (mood, token, value("authorization")) {
        (Mood::Good, Some(token), sent) if sent != Some(format!("Bearer {token}").as_str()) => {
            Mood::Unauthorized
        }
        _ => mood,
    };
    let file = ["main", COMMIT]
        .iter()
        .find_map(|revision| path.strip_prefix(&format!("/datasets/{repo}/resolve/{revision}/")));
    let listed = path.split('?').next().unwrap().strip_prefix(&format!("/api/datasets/{repo}/tree/main/"));
    let list = listed.map(|folder| {
        let entry = |(path, contents): (&String, &Vec<u8>)| {
            let size = contents.len();
            format!(r#"{{"type":"file","oid":"0","size":{size},"path":{path:?}}}"#)
        };
        let inside = files.iter().filter(|(path, _)| path.starts_with(&format!("{folder}/")));
        format!("[{}]", inside.map(entry).collect::<Vec<_>>().join(",")).into_bytes()
    });
    let commit = if mood == Mood::Misnaming { OUTSIDE } else { COMMIT };
    let info = path.starts_with(&format!("/api/datasets/{repo}/revision/main?"));
    let info = info.then(|| format!(r#"{{"id":{repo:?},"sha":{commit:?}}}"#).into_bytes());
    let body = file.and_then(|file| files.get(file).filter(|_| mood != Mood::Empty));
    let body = body.or(list.as_ref()).or(info.as_ref());
    let status = match (mood, body) {
        (Mood::Silent, _) => {
            std::thread::sleep(Duration::from_secs(5));
            return Ok(());
        }
        (Mood::Failing, _) => "500 Internal Server Error",
        (Mood::Unauthorized, _) => "401 Unauthorized",
        (Mood::Forbidden, _) => "403 Forbidden",
        (Mood::Limiting, _) => "429 Too Many Requests",
        (_, None) => "404 Not Found",
        _ => "200 OK",
    };
    let mut body = body.filter(|_| status == "200 OK").cloned().unwrap_or_default();
    let length = body.len();
    let message = if status.starts_with("40") { "X-Error-Message: Access is restricted.\r\n" } else { "" };
    let etag = if mood == Mood::Placing { OUTSIDE } else { "0123456789abcdef" };
    let commit = if mood == Mood::Placing { OUTSIDE } else { COMMIT };
    let extent = match (mood, file) {
        (Mood::Endless, Some(_)) => "Transfer-Encoding: chunked".into(),
        _ => format!("Content-Length: {length}"),
    };
    write!(
        stream,
        "HTTP/1.1 {status}\r\n{extent}\r\nETag: \"{etag}\"\r\nX-Repo-Commit: {commit}\r\n\
         {message}Connection: close\r\n\r\n"
    )?;
    if method == "HEAD" {
        return Ok(());
    }
    match (mood, file) {
        (Mood::Truncating | Mood::Stalling, Some(_)) => body.truncate(length / 2),
        (Mood::Corrupting, Some(_)) => body[length / 2] ^= 0x55,
        (Mood::Trickling, Some(_)) => {
            for byte in body {
                stream.write_all(&[byte])?;
                stream.flush()?;
                std::thread::sleep(Duration::from_millis(20));
            }
            return Ok(());
        }
        (Mood::Endless, Some(_)) => loop {
            write!(stream, "400\r\n{}\r\n", "x".repeat(0x400))?;
        },
        _ => {}
    }
    stream.write_all(&body)?;
    stream.flush()?;
    if mood == Mood::Stalling {
        std::thread::sleep(Duration::from_secs(5));
    }
    Ok(())
}
