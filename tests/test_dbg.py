import sys, gc
from torch import nn
import tests.test_undo as t
from tokenpaths.undo import Undo
def test_x():
  m=nn.Linear(2,2); before=t.state(m)
  left=0; last=None
  def count(frame,event,arg):
            nonlocal left,last
            left-=1
            if left<0:
                sys.setprofile(None); 
                f=frame; st=[]
                while f and len(st)<9: st.append((f.f_code.co_qualname,f.f_lineno)); f=f.f_back
                last=(event,getattr(arg,'__name__',arg),st); raise KeyboardInterrupt
  for number in range(0,4000):
        left=number
        try:
            sys.setprofile(count); t.in_a_block(m)
        except KeyboardInterrupt: pass
        finally: sys.setprofile(None)
        if t.state(m)!=before:
            print(number,last); 
            for o in gc.get_objects():
                if type(o) is Undo:
                    for r in gc.get_referrers(o): print('   ', type(r), str(r)[:200])
            gc.collect(); print(' after gc', t.state(m)==before)
            m=nn.Linear(2,2); before=t.state(m)
        if left>=0: print('done',number); break
