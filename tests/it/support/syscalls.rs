//! System calls of a child, one at a time: each of the chosen ones waits in the kernel until the test has decided what becomes of it.
//! So a process can be killed between any two of them, or told that a disk is full, without root and without a debugger.
//! (seccomp's user notification: Linux 5.5 or newer.)

use std::ffi::OsString;
use std::io;
use std::mem::{size_of, zeroed};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStringExt;
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixDatagram;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Child, Command};

/// What becomes of a call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// It is carried out.
    Goes,
    /// It is not carried out, and gives this error.
    Fails(libc::c_int),
    /// It is not carried out, and returns this value as if it had been.
    Pretends(i64),
    /// It is not carried out: the process is killed.
    Kills,
}

/// Calls that change a file, a directory or a connection. Of `openat` only those that may make a file are meant.
pub const CHANGES: &[libc::c_long] = &[
    libc::SYS_openat,
    libc::SYS_write,
    libc::SYS_pwrite64,
    libc::SYS_writev,
    libc::SYS_sendto,
    // What was asked for is done, and the answer is not read yet.
    libc::SYS_recvfrom,
    libc::SYS_fsync,
    libc::SYS_fdatasync,
    libc::SYS_ftruncate,
    libc::SYS_renameat2,
    libc::SYS_linkat,
    libc::SYS_unlinkat,
    libc::SYS_mkdirat,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_rename,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_link,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_unlink,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_mkdir,
];

/// Calls that close a descriptor.
pub const CLOSES: &[libc::c_long] = &[
    libc::SYS_close,
    libc::SYS_close_range,
    libc::SYS_dup3,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_dup2,
];

/// A call that waits.
#[derive(Debug)]
pub struct Call {
    /// Of the thread that calls.
    pub thread: u32,
    pub number: libc::c_long,
    pub arguments: [u64; 6],
}

impl Call {
    /// What the file is that the call is about, and what it is to be renamed to.
    pub fn paths(&self) -> Vec<PathBuf> {
        let [first, second, _, fourth, ..] = self.arguments;
        match self.number {
            libc::SYS_openat | libc::SYS_unlinkat | libc::SYS_mkdirat => vec![self.path_at(second)],
            libc::SYS_renameat2 | libc::SYS_linkat => vec![self.path_at(second), self.path_at(fourth)],
            #[cfg(target_arch = "x86_64")]
            libc::SYS_rename | libc::SYS_link => vec![self.path_at(first), self.path_at(second)],
            #[cfg(target_arch = "x86_64")]
            libc::SYS_unlink | libc::SYS_mkdir => vec![self.path_at(first)],
            // The descriptor that is replaced is closed.
            libc::SYS_dup3 => vec![self.path_of(second)],
            #[cfg(target_arch = "x86_64")]
            libc::SYS_dup2 => vec![self.path_of(second)],
            libc::SYS_close_range => (first..=second.min(1023)).map(|descriptor| self.path_of(descriptor)).collect(),
            _ => vec![self.path_of(first)],
        }
    }

    /// Whether an `openat` may make a file.
    pub fn creates(&self) -> bool {
        self.number == libc::SYS_openat && self.arguments[2] & libc::O_CREAT as u64 != 0
    }

    fn path_of(&self, descriptor: u64) -> PathBuf {
        std::fs::read_link(format!("/proc/{}/fd/{}", self.thread, descriptor as u32)).unwrap_or_default()
    }

    fn path_at(&self, address: u64) -> PathBuf {
        let mut bytes = vec![0; 4096];
        let memory = std::fs::File::open(format!("/proc/{}/mem", self.thread));
        let len = memory.and_then(|memory| memory.read_at(&mut bytes, address)).unwrap_or(0);
        let end = bytes[..len].iter().position(|&byte| byte == 0).unwrap_or(0);
        PathBuf::from(OsString::from_vec(bytes[..end].to_vec()))
    }
}

/// Starts a program; `decide` is asked about each of its `calls` from then on, from a thread that ends with the program.
pub fn spawn(
    command: &mut Command,
    calls: &[libc::c_long],
    decide: impl FnMut(&Call) -> Verdict + Send + 'static,
) -> Child {
    let (ours, theirs) = UnixDatagram::pair().unwrap();
    let mut filter = filter(calls);
    // SAFETY: only system calls on memory that was made before the fork.
    unsafe { command.pre_exec(move || give_away(&mut filter, theirs.as_raw_fd())) };
    let child = command.spawn().unwrap();
    let listener = take(&ours).expect("no seccomp notifications: the kernel or the container's profile forbids them");
    std::thread::spawn(move || supervise(&listener, decide));
    child
}

fn filter(calls: &[libc::c_long]) -> Vec<libc::sock_filter> {
    let is_call = |call: &libc::c_long| (libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K, *call as u32);
    let number_at = std::mem::offset_of!(libc::seccomp_data, nr) as u32;
    let statement = |code: u32, k: u32| libc::sock_filter { code: code as u16, jt: 0, jf: 0, k };
    let mut program = vec![statement(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, number_at)];
    for (index, (code, k)) in calls.iter().map(is_call).enumerate() {
        // To the last statement, behind the other comparisons and the one that lets all else go.
        let jt = (calls.len() - index) as u8;
        program.push(libc::sock_filter { code: code as u16, jt, jf: 0, k });
    }
    program.push(statement(libc::BPF_RET | libc::BPF_K, libc::SECCOMP_RET_ALLOW));
    program.push(statement(libc::BPF_RET | libc::BPF_K, libc::SECCOMP_RET_USER_NOTIF));
    program
}

/// In the child: puts itself under the filter, and sends away what its calls are decided with.
fn give_away(filter: &mut [libc::sock_filter], to: RawFd) -> io::Result<()> {
    let program = libc::sock_fprog { len: filter.len() as u16, filter: filter.as_mut_ptr() };
    // SAFETY: plain system calls; the pointers are valid for as long as they last.
    unsafe {
        if libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0 {
            return Err(io::Error::last_os_error());
        }
        let (mode, flags) = (libc::SECCOMP_SET_MODE_FILTER, libc::SECCOMP_FILTER_FLAG_NEW_LISTENER);
        let listener = libc::syscall(libc::SYS_seccomp, mode, flags, &raw const program);
        if listener < 0 {
            return Err(io::Error::last_os_error());
        }
        let mut message = Message::new();
        let header = message.header();
        let control = libc::CMSG_FIRSTHDR(&raw const header);
        (*control).cmsg_level = libc::SOL_SOCKET;
        (*control).cmsg_type = libc::SCM_RIGHTS;
        (*control).cmsg_len = libc::CMSG_LEN(size_of::<RawFd>() as u32) as _;
        libc::CMSG_DATA(control).cast::<RawFd>().write_unaligned(listener as RawFd);
        match libc::sendmsg(to, &raw const header, 0) {
            sent if sent < 0 => Err(io::Error::last_os_error()),
            _ => Ok(()),
        }
    }
}

/// One byte, and room for one descriptor.
struct Message {
    byte: u8,
    part: libc::iovec,
    control: [u64; 4],
}

impl Message {
    fn new() -> Self {
        Self { byte: 0, part: libc::iovec { iov_base: std::ptr::null_mut(), iov_len: 1 }, control: [0; 4] }
    }

    /// Points into the message, which must not move.
    fn header(&mut self) -> libc::msghdr {
        self.part.iov_base = (&raw mut self.byte).cast();
        // SAFETY: a header of zeros is valid.
        let mut header: libc::msghdr = unsafe { zeroed() };
        header.msg_iov = &raw mut self.part;
        header.msg_iovlen = 1;
        header.msg_control = self.control.as_mut_ptr().cast();
        // SAFETY: computes a length.
        header.msg_controllen = unsafe { libc::CMSG_SPACE(size_of::<RawFd>() as u32) } as _;
        header
    }
}

fn take(socket: &UnixDatagram) -> Option<OwnedFd> {
    let mut message = Message::new();
    let mut header = message.header();
    // SAFETY: the header points to memory that is valid; the descriptor that comes is nobody else's.
    unsafe {
        if libc::recvmsg(socket.as_raw_fd(), &raw mut header, libc::MSG_CMSG_CLOEXEC | libc::MSG_DONTWAIT) < 0 {
            return None;
        }
        let control = libc::CMSG_FIRSTHDR(&raw const header);
        if control.is_null() {
            return None;
        }
        Some(OwnedFd::from_raw_fd(libc::CMSG_DATA(control).cast::<RawFd>().read_unaligned()))
    }
}

/// Answers until nobody is left who could ask.
fn supervise(listener: &OwnedFd, mut decide: impl FnMut(&Call) -> Verdict) {
    let fd = listener.as_raw_fd();
    loop {
        let mut poll = libc::pollfd { fd, events: libc::POLLIN, revents: 0 };
        // SAFETY: one valid structure, then structures that the kernel fills and reads.
        unsafe {
            if libc::poll(&raw mut poll, 1, -1) < 0 {
                continue;
            }
            if poll.revents & libc::POLLIN == 0 {
                return;
            }
            let mut asked: libc::seccomp_notif = zeroed();
            if libc::ioctl(fd, libc::SECCOMP_IOCTL_NOTIF_RECV, &raw mut asked) != 0 {
                // Who asked was killed meanwhile.
                continue;
            }
            let call = Call { thread: asked.pid, number: asked.data.nr.into(), arguments: asked.data.args };
            let mut answer: libc::seccomp_notif_resp = zeroed();
            answer.id = asked.id;
            match decide(&call) {
                Verdict::Goes => answer.flags = libc::SECCOMP_USER_NOTIF_FLAG_CONTINUE as u32,
                Verdict::Fails(errno) => answer.error = -errno,
                Verdict::Pretends(value) => answer.val = value,
                Verdict::Kills => {
                    // Of its whole process: any thread's number will do.
                    libc::kill(asked.pid as libc::pid_t, libc::SIGKILL);
                    continue;
                }
            }
            libc::ioctl(fd, libc::SECCOMP_IOCTL_NOTIF_SEND, &raw mut answer);
        }
    }
}
