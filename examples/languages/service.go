// A redirect service on plain socket options: no library, no privilege beyond its cgroup.
//
//	go build service.go
//	sudo carnet service run NAME -- ./service
package main

import (
	"encoding/binary"
	"fmt"
	"io"
	"log"
	"net"
	"net/netip"
	"syscall"
	"unsafe"
)

// docs/abi.md
const (
	wfp                  = 0x57465000 // the level, "WFP\0"
	queryRedirectRecords = 220
	setRedirectRecords   = 222
	originalDestination  = 225
	registerListener     = 227
)

// getOption is getsockopt(2) with a buffer that holds every answer.
func getOption(socket syscall.Conn, option uintptr) ([]byte, error) {
	raw, err := socket.SyscallConn()
	if err != nil {
		return nil, err
	}
	buffer := make([]byte, 2048)
	length := uint32(len(buffer))
	var errno syscall.Errno
	err = raw.Control(func(fd uintptr) {
		_, _, errno = syscall.Syscall6(syscall.SYS_GETSOCKOPT, fd, wfp, option,
			uintptr(unsafe.Pointer(&buffer[0])), uintptr(unsafe.Pointer(&length)), 0)
	})
	if err == nil && errno != 0 {
		err = fmt.Errorf("option %d: %w", option, errno)
	}
	return buffer[:length], err
}

// setOption is setsockopt(2).
func setOption(raw syscall.RawConn, option int, value []byte) error {
	var failure error
	err := raw.Control(func(fd uintptr) {
		failure = syscall.SetsockoptString(int(fd), wfp, option, string(value))
	})
	if err == nil && failure != nil {
		err = fmt.Errorf("option %d: %w", option, failure)
	}
	return err
}

// connectOnwards opens the connection to where the accepted one wanted to go, with its record.
func connectOnwards(accepted *net.TCPConn) (*net.TCPConn, error) {
	record, err := getOption(accepted, queryRedirectRecords)
	if err != nil {
		return nil, err
	}
	// Address in network byte order, IPv4 as ::ffff:a.b.c.d; port; family; zero.
	original, err := getOption(accepted, originalDestination)
	if err != nil {
		return nil, err
	}
	address := netip.AddrFrom16(*(*[16]byte)(original[:16])).Unmap()
	port := binary.LittleEndian.Uint16(original[16:18])
	dialer := net.Dialer{
		// Before connect(): that is where the kernel reads it.
		Control: func(_, _ string, raw syscall.RawConn) error {
			return setOption(raw, setRedirectRecords, record)
		},
	}
	onwards, err := dialer.Dial("tcp", netip.AddrPortFrom(address, port).String())
	if err != nil {
		return nil, err
	}
	return onwards.(*net.TCPConn), nil
}

// relay copies one direction and passes its end on; an error ends both directions.
func relay(to, from *net.TCPConn) {
	if _, err := io.Copy(to, from); err != nil {
		to.Close()
		from.Close()
		return
	}
	to.CloseWrite()
}

// serve serves one connection from its beginning to its end.
func serve(accepted *net.TCPConn) {
	defer accepted.Close()
	onwards, err := connectOnwards(accepted)
	if err != nil {
		log.Printf("connection ended: %v", err)
		return
	}
	defer onwards.Close()
	there := make(chan struct{})
	go func() {
		defer close(there)
		relay(onwards, accepted)
	}()
	relay(accepted, onwards)
	<-there
}

func main() {
	ended := make(chan error)
	for _, address := range []string{"127.0.0.1:0", "[::1]:0"} {
		listener, err := net.Listen("tcp", address)
		if err != nil {
			log.Fatal(err)
		}
		raw, err := listener.(*net.TCPListener).SyscallConn()
		if err != nil {
			log.Fatal(err)
		}
		// Tells the kernel that the listener is this service's.
		if err := setOption(raw, registerListener, nil); err != nil {
			log.Fatalf("register the listener (is this process in a service's cgroup?): %v", err)
		}
		go func() {
			for {
				accepted, err := listener.Accept()
				if err != nil {
					ended <- err
					return
				}
				go serve(accepted.(*net.TCPConn))
			}
		}()
	}
	fmt.Println("ready")
	log.Fatal(<-ended)
}
